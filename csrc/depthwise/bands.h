// How the lines of a depthwise convolution's result fall into bands whose part of the image stays in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "depthwise/slab.h"
#include "qconv/product.h"

namespace bitorch_engine {

constexpr int64_t SLAB_BYTES = 1 << 17;

// Bands cut the result along the slab's dimension; `steps` result pixels (of each phase) make one.
struct Bands {
  int dimension;
  int64_t reach, steps, all;  // rows that one result pixel reads; result pixels of a band, of all
  const Product& p;

  Bands(const Product& p, int threads) : dimension(Slab::dimension(p)), reach(1), all(0), p(p) {
    for (const Phase& phase : p.phases) {
      all = std::max(all, phase.count[dimension]);
      for (const Tap& tap : phase.taps) reach = std::max(reach, p.before[dimension] + tap.shift[dimension] + 1);
    }
    const int64_t fit = SLAB_BYTES / std::max<int64_t>(1, Slab::row_pixels(p) * Slab::pixel_bytes(p));
    const int64_t shared = (p.batch * all + threads - 1) / threads;
    steps = std::max<int64_t>(1, std::min({all, shared, (fit - reach) / p.base_step[dimension] + 1}));
  }

  int64_t count() const { return (all + steps - 1) / steps; }
  int64_t row(int64_t pixel) const { return pixel * p.base_step[dimension]; }
  int64_t rows(int64_t pixels) const { return (pixels - 1) * p.base_step[dimension] + reach; }

  // Bytes from the start of a slab that was filled for the band from result pixel `first` on, to the base of the first
  // pixel of line (z, y).
  int64_t base(int64_t z, int64_t y, int64_t first) const {
    const int64_t plane = dimension == 0 ? (z - first) * p.base_step[0] + p.before[0] : 0;
    const int64_t line = (dimension == 1 ? y - first : y) * p.base_step[1] + p.before[1];
    return ((plane * p.padded[1] + line) * Slab::line_pixels(p) + p.before[2]) * Slab::pixel_bytes(p);
  }
};

// Where the products of a phase, (tap, image channel), lie in a slab, in bytes from the base.
static inline std::vector<int64_t> product_offsets(const Product& p, const Phase& phase) {
  const int64_t line = Slab::line_pixels(p);
  const int64_t plane = Slab::dimension(p) == 0 ? p.padded[1] * line : 0;  // else there is one
  std::vector<int64_t> offsets;
  offsets.reserve(phase.taps.size() * p.image_channels + 1);
  for (const Tap& tap : phase.taps)
    for (int64_t c = 0; c < p.image_channels; ++c)
      offsets.push_back((tap.shift[0] * plane + tap.shift[1] * line + tap.shift[2]) * Slab::pixel_bytes(p) +
                        c * Slab::lanes(p));
  return offsets;
}

}  // namespace bitorch_engine
