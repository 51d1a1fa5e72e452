#include "binary/boxes.h"

#include <algorithm>
#include <limits>

#include "binary/binary.h"

namespace bitorch_engine {
namespace binary {
namespace {

std::vector<Span> spans(const Geometry& g, int d) {
  return bitorch_engine::spans(g.in[d], g.kernel[d], -g.pad[d], g.dilation[d], g.stride[d], g.out[d]);
}

// Cuts a box into tiles along the dimension where that makes the fewest.
void cut(Box& box, int64_t pixels, bool any) {
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int d = 3; d >= 0; --d) {
    const int64_t length = box.span[d].count, pieces = (length + pixels - 1) / pixels;
    if (box.count() / length * pieces >= fewest || (!any && d < 3 && box.span[3].count > 1)) continue;
    fewest = box.count() / length * pieces;
    box.along = d;
    box.pieces = pieces;
  }
}

}  // namespace

std::vector<Box> boxes(const Geometry& g, int64_t pixels, bool whole, bool any) {
  std::vector<Box> found;
  const Span samples{0, g.batch, 0, 1};
  const std::vector<Span> depth = spans(g, 0), height = spans(g, 1), width = spans(g, 2);
  for (const Span& z : depth)
    for (const Span& y : height)
      for (const Span& x : width)
        for (Box box{{samples, z, y, x}, 3, 0, 0}, rest; box.count() > 0; box = rest) {
          cut(box, pixels, any);
          rest = box;
          Span &taken = box.span[box.along], &left = rest.span[box.along];
          left.count = whole && box.count() / taken.count >= pixels ? taken.count % pixels : 0;
          if (left.count == taken.count) left.count = 0;
          taken.count -= left.count;
          left.first += taken.count;
          box.pieces = (taken.count + pixels - 1) / pixels;
          box.first_tile = found.empty() ? 0 : found.back().end();
          found.push_back(box);
        }
  return found;
}

}  // namespace binary
}  // namespace bitorch_engine
