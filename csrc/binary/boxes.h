// Which taps lie inside the image: result pixels are grouped by them, so that padding is never computed.
//
//   3x3, padding 1:  corner | edge | corner     9 boxes, each with one range of taps a dimension
//                    edge   | all  | edge
//                    corner | edge | corner
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/geometry.h"
#include "runtime/spans.h"

namespace bitorch_engine {
namespace binary {

// All result pixels that read the same taps, cut into tiles along one of the dimensions.
struct Box {
  Span span[4];  // sample, depth, height, width
  int along;
  int64_t pieces;      // tiles that a line of that dimension is cut into
  int64_t first_tile;  // of all boxes

  int64_t count() const { return span[0].count * span[1].count * span[2].count * span[3].count; }
  int64_t tiles() const { return count() / span[along].count * pieces; }
  int64_t end() const { return first_tile + tiles(); }
};

// pixels: of a tile at most.  whole: a tile of fewer takes as long, so that what is left of lines is cut across them.
// any: tiles may go along every dimension; otherwise along the width, where results lie together.
std::vector<Box> boxes(const Geometry& geometry, int64_t pixels, bool whole, bool any);

}  // namespace binary
}  // namespace bitorch_engine
