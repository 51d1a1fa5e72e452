// Which taps of a convolution lie inside of the image, in one dimension.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bitorch_engine {

// Result positions that read the same taps, low .. high - 1: the others lie outside of the image.
struct Span {
  int64_t first, count, low, high;
};

// Result y reads positions y * step + start + k * distance of an image of `in`, for k = 0 .. taps - 1.
static inline std::vector<Span> spans(int64_t in, int64_t taps, int64_t start, int64_t distance, int64_t step,
                                      int64_t results) {
  std::vector<Span> found;
  found.reserve(8);
  for (int64_t y = 0, next; y < results; y = next) {
    const int64_t base = y * step + start;
    const int64_t high = std::clamp<int64_t>((in - base + distance - 1) / distance, 0, taps);
    const int64_t low = std::clamp<int64_t>((-base + distance - 1) / distance, 0, high);
    next = y + 1;
    if (low == 0 && high == taps)  // the interior, in one step
      next = std::min(results, (in - 1 - (taps - 1) * distance - start) / step + 1);
    if (!found.empty() && found.back().low == low && found.back().high == high)
      found.back().count += next - y;
    else
      found.push_back({y, next - y, low, high});
  }
  return found;
}

}  // namespace bitorch_engine
