// The regions of a phase as the multiply kernels take them: where pixels read, and what `zero` is worth there.
#pragma once

#include <cstdint>
#include <vector>

#include "qconv/qconv.h"
#include "qconv/regions.h"
#include "runtime/buffer.h"

namespace bitorch_engine {

// A region, and what its pixels have in common.
struct Area {
  Region region;
  int64_t first, last;        // its pixels in all samples: first .. last - 1 of the phase's
  const Read* reads;
  int64_t read_count, depth;  // taps that follow each other in memory are one read, of so much depth
  const int32_t* zero_sum;    // (groups * blocks * 16): `zero` times the sum of the weights of its taps
};

// The regions of a phase that the kernel in use takes apart. pairs: of pairs_that_fit.
std::vector<Region> regions_in_use(const Product& product, const Phase& phase, int64_t pairs);

// Those of a phase, in which the pixels of one come after those of another.
class Areas {
 public:
  // sums: of be_qconv_arrange.  zero: what the image is padded with.
  Areas(const Product& product, const Phase& phase, const std::vector<Region>& all, const int32_t* sums, int zero);

  const Area* begin() const { return areas_.data(); }
  const Area* end() const { return begin() + areas_.size(); }
  bool several() const { return areas_.size() > 1; }
  int64_t pixels() const { return areas_.back().last; }

 private:
  std::vector<Area> areas_;
  Buffer<Read> reads_;
  Buffer<int32_t> zero_sums_;
};

}  // namespace bitorch_engine
