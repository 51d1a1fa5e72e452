#include "binary/boxes.h"

#include <algorithm>
#include <limits>

#include "binary/binary.h"

namespace bitorch_engine {
namespace binary {
namespace {

std::vector<Span> spans(const Geometry& g, int d) {
  const int64_t in = g.in[d], kernel = g.kernel[d], stride = g.stride[d], dilation = g.dilation[d];
  std::vector<Span> found;
  for (int64_t y = 0, next; y < g.out[d]; y = next) {
    const int64_t base = y * stride - g.pad[d];
    const int64_t high = std::clamp<int64_t>((in - base + dilation - 1) / dilation, 0, kernel);
    const int64_t low = std::clamp<int64_t>((-base + dilation - 1) / dilation, 0, high);
    next = y + 1;
    if (low == 0 && high == kernel)  // the interior, in one step
      next = std::min(g.out[d], (in - 1 - (kernel - 1) * dilation + g.pad[d]) / stride + 1);
    if (!found.empty() && found.back().low == low && found.back().high == high)
      found.back().count += next - y;
    else
      found.push_back({y, next - y, low, high});
  }
  return found;
}

// Cuts a box into tiles along the dimension where that makes the fewest.
void cut(Box& box, int64_t pixels, bool channels_last) {
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int d = 3; d >= 0; --d) {
    const int64_t length = box.span[d].count, pieces = (length + pixels - 1) / pixels;
    if (box.count() / length * pieces >= fewest || (!channels_last && d < 3 && box.span[3].count > 1)) continue;
    fewest = box.count() / length * pieces;
    box.along = d;
    box.pieces = pieces;
  }
}

}  // namespace

std::vector<Box> boxes(const Geometry& g, int64_t pixels, bool whole, bool channels_last) {
  std::vector<Box> found;
  const Span samples{0, g.batch, 0, 1};
  const std::vector<Span> depth = spans(g, 0), height = spans(g, 1), width = spans(g, 2);
  for (const Span& z : depth)
    for (const Span& y : height)
      for (const Span& x : width)
        for (Box box{{samples, z, y, x}, 3, 0, 0}, rest; box.count() > 0; box = rest) {
          cut(box, pixels, channels_last);
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
