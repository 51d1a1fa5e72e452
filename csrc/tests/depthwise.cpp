#include "depthwise/depthwise.h"

#include "lanes.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

Written multiply(DepthwiseFunction kernel, Random& random) {
  DepthwiseLines line{};
  line.pairs = random.between(0, 12);
  line.step = random.between(1, 200);
  line.pixels = random.between(1, 20);
  line.channels = random.between(1, 100);
  line.lines = random.between(1, 3);
  line.line_step = random.between(0, 300);
  const int64_t largest = (1 << random.between(1, 8)) - 1, largest_weight = 1 << random.between(0, 7);
  std::vector<int64_t> offsets(2 * line.pairs);
  for (int64_t& offset : offsets) offset = random.between(0, 500);
  const int64_t lanes = whole_blocks(line.channels), zero = random.between(0, largest);
  const int64_t size = 2 * line.line_step + line.pixels * line.step + 500 + lanes + MARGIN;
  const std::vector<uint8_t> slab = random.bytes(size, largest);
  std::vector<int8_t> weights(2 * line.pairs * lanes);
  std::vector<int32_t> start(lanes);
  for (int64_t o = 0; o < lanes; ++o)
    for (int64_t k = 0; k < 2 * line.pairs; ++k) {
      int8_t& weight = weights[(o / LANE_BLOCK * line.pairs + k / 2) * 64 + place_of_lane(o % LANE_BLOCK) + k % 2];
      weight = static_cast<int8_t>(random.between(-largest_weight, largest_weight - 1));
      start[o] -= static_cast<int32_t>(zero * weight);
    }
  const std::vector<float> factor = random.numbers(lanes, 0.01f), bias = random.numbers(lanes, 9);
  line.pitch = line.channels + random.between(0, 5);
  line.line_pitch = line.pixels * line.pitch + random.between(0, 5);
  std::vector<float> out(line.lines * line.line_pitch);
  line.base = slab.data();
  line.offsets = offsets.data();
  line.weights = weights.data();
  line.start = start.data();
  line.factor = factor.data();
  line.bias = random.flip() ? bias.data() : nullptr;
  line.fit = pairs_that_fit(largest, largest_weight);
  line.out = out.data();
  kernel(line);
  return Written().add(out);
}

Written gradient(DepthwiseGradientFunction kernel, Random& random) {
  const int64_t products = random.between(0, 30), step = random.between(1, 100), pixels = random.between(1, 40);
  const int64_t pitch = LANE_BLOCK + random.between(0, 9);
  std::vector<int64_t> offsets(products);
  for (int64_t& offset : offsets) offset = random.between(0, 500);
  const std::vector<uint8_t> slab = random.bytes(pixels * step + 500 + LANE_BLOCK + MARGIN);
  const std::vector<uint8_t> rows = random.bytes(pixels * pitch + MARGIN);
  std::vector<int32_t> totals((1 + products) * LANE_BLOCK, 5);
  kernel({slab.data(), offsets.data(), products, step, pixels, rows.data(), pitch,
          static_cast<int>(random.flip() ? 128 : random.between(0, 1)), totals.data()});
  return Written().add(totals);
}

}  // namespace

void check_depthwise(Agreement& agreement) {
  agreement.check(depthwise_kernel, 200, multiply);
  agreement.check(depthwise_gradient_kernel, 100, gradient);
}

}  // namespace bitorch_engine
