#include "depthwise/depthwise.h"

namespace bitorch_engine {

void depthwise_scalar(const DepthwiseLines& l) {
  for (int64_t i = 0; i < l.lines * l.pixels; ++i)
    for (int64_t o = 0; o < l.channels; ++o) {
      const int64_t y = i / l.pixels, x = i % l.pixels;
      const uint8_t* pixel = l.base + y * l.line_step + x * l.step + o;
      const int8_t* weights = l.weights + o / LANE_BLOCK * l.pairs * 64 + place_of_lane(o % LANE_BLOCK);
      int32_t total = l.start[o];
      for (int64_t k = 0; k < l.pairs; ++k)
        total += pixel[l.offsets[2 * k]] * weights[64 * k] + pixel[l.offsets[2 * k + 1]] * weights[64 * k + 1];
      const float value = static_cast<float>(total) * l.factor[o];
      l.out[y * l.line_pitch + x * l.pitch + o] = l.bias ? value + l.bias[o] : value;
    }
}

void depthwise_gradient_scalar(const DepthwiseGradientLine& l) {
  for (int64_t x = 0; x < l.pixels; ++x)
    for (int64_t o = 0; o < LANE_BLOCK; ++o) {
      const int32_t row = l.rows[x * l.pitch + o] - l.row_zero;
      l.totals[o] += row;
      for (int64_t k = 0; k < l.products; ++k)
        l.totals[(1 + k) * LANE_BLOCK + o] += row * l.base[x * l.step + o + l.offsets[k]];
    }
}

}  // namespace bitorch_engine
