// Which taps lie inside of the image: result pixels are grouped by them, so that products with padding are left out.
//
//   3x3, padding 1:  corner | edge | corner     9 regions, each with one range of taps a dimension
//                    edge   | all  | edge
//                    corner | edge | corner
#pragma once

#include <cstdint>
#include <vector>

#include "qconv/product.h"
#include "runtime/spans.h"

namespace bitorch_engine {

// Result pixels of a phase, in every sample, and the taps that they read: all others lie in the padding for each of
// them.
struct Region {
  Span span[3];  // depth, height, width

  int64_t pixels() const { return span[0].count * span[1].count * span[2].count; }  // of a sample
  int64_t taps() const {
    return (span[0].high - span[0].low) * (span[1].high - span[1].low) * (span[2].high - span[2].low);
  }
};

// All pixels of a phase, with all taps.
Region whole(const Phase& phase);

// What kernels take. Each region is cut into tiles of `pixels`; for each, the weights that it needs are prepared in the
// time of so many pixels more.
struct Tiles {
  int64_t pixels, preparation;
};

// The pixels of a phase in regions: one, or several where the products that are left out outweigh the tiles that are
// not full.
std::vector<Region> regions(const Product& product, const Phase& phase, const Tiles& tiles);

}  // namespace bitorch_engine
