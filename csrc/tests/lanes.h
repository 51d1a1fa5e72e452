// What the checks of kernels share whose lanes of a vector are result channels.
#pragma once

#include "agreement.h"
#include "depthwise/depthwise.h"

namespace bitorch_engine {

inline int64_t whole_blocks(int64_t lanes) { return (lanes + LANE_BLOCK - 1) / LANE_BLOCK * LANE_BLOCK; }

// Runs a kernel on lines whose image and size are set; weights of `taps` taps and all else are drawn.
template <class Lines>
Written multiply_lines(void (*kernel)(const Lines&), Lines line, int64_t taps, int64_t largest, int64_t largest_weight,
                       Random& random) {
  const int64_t lanes = whole_blocks(line.channels), zero = random.between(0, largest);
  std::vector<int8_t> weights(2 * line.pairs * lanes);
  std::vector<int32_t> start(lanes);
  for (int64_t o = 0; o < lanes; ++o)
    for (int64_t k = 0; k < taps; ++k) {
      int8_t& weight = weights[(o / LANE_BLOCK * line.pairs + k / 2) * 64 + place_of_lane(o % LANE_BLOCK) + k % 2];
      weight = static_cast<int8_t>(random.between(-largest_weight, largest_weight - 1));
      start[o] -= static_cast<int32_t>(zero * weight);
    }
  const std::vector<float> factor = random.numbers(lanes, 0.01f), bias = random.numbers(lanes, 9);
  line.pitch = line.channels + random.between(0, 5);
  line.line_pitch = line.pixels * line.pitch + random.between(0, 5);
  std::vector<float> out(line.lines * line.line_pitch);
  line.weights = weights.data();
  line.start = start.data();
  line.factor = factor.data();
  line.bias = random.flip() ? bias.data() : nullptr;
  line.fit = 32767 / (2 * largest * largest_weight);
  line.out = out.data();
  kernel(line);
  return Written().add(out);
}

}  // namespace bitorch_engine
