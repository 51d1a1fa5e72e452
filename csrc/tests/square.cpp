#include "square/square.h"

#include "lanes.h"

namespace bitorch_engine {
namespace {

Written multiply(SquareFunction kernel, Random& random) {
  SquareLine line{};
  line.strided = random.flip();
  line.pixels = random.between(1, 40);
  line.channels = random.between(1, 100);
  const int64_t lanes = whole_blocks(line.channels), pixels = (line.pixels * (line.strided ? 2 : 1) + 3) / 2 * 2;
  line.block_step = LANE_BLOCK * pixels;
  const std::vector<uint8_t> slab = random.bytes(5 * pixels * lanes);
  for (const uint8_t*& row : line.rows) row = slab.data() + random.between(0, 4) * pixels * lanes;
  std::vector<int8_t> weights(lanes / LANE_BLOCK * SQUARE_BYTES);
  std::vector<int32_t> start(lanes);
  const int64_t zero = random.between(0, 255);
  for (int64_t o = 0; o < lanes; ++o)
    for (int64_t k = 0; k < 9; ++k) {
      const int8_t weight = static_cast<int8_t>(random.between(-8, 7));
      for (int64_t place : PLACES_OF_TAP[k % 3])
        weights[o / LANE_BLOCK * SQUARE_BYTES + k / 3 * SQUARE_ROW + place_in_pair(o % LANE_BLOCK) + place] = weight;
      start[o] -= static_cast<int32_t>(zero * weight);
    }
  const std::vector<float> factor = random.numbers(lanes, 0.01f), bias = random.numbers(lanes, 9);
  line.pitch = line.channels + random.between(0, 5);
  std::vector<float> out(line.pixels * line.pitch);
  line.weights = weights.data();
  line.start = start.data();
  line.factor = factor.data();
  line.bias = random.flip() ? bias.data() : nullptr;
  line.out = out.data();
  kernel(line);
  return Written().add(out);
}

Written pair(PairFunction kernel, Random& random) {
  const int64_t pixels = 2 * random.between(1, 20), lanes = LANE_BLOCK * random.between(1, 4);
  const std::vector<uint8_t> line = random.bytes(pixels * lanes);
  std::vector<uint8_t> pairs(pixels * lanes);
  kernel(line.data(), pixels, lanes, pairs.data());
  return Written().add(pairs);
}

Written quantize(QuantizePairsFunction kernel, Random& random) {
  FloatLine line{};
  line.pixels = random.between(1, 20);
  line.channels = random.between(1, 100);
  line.pixel_stride = line.channels + random.between(0, 5);
  line.before = random.between(0, 3);
  line.padded = (line.before + line.pixels + random.between(0, 3) + 1) / 2 * 2;
  std::vector<float> x = random.numbers((line.pixels - 1) * line.pixel_stride + line.channels, 3);
  random.spoil(x);
  if (random.flip()) x[0] = random.flip() ? 3e38f : -1e6f;
  line.x = x.data();
  const int bits = static_cast<int>(random.between(2, 8));
  const float low = random.flip() ? 0.0f : -static_cast<float>(1 << (bits - 1));
  std::vector<uint8_t> pairs(line.padded * whole_blocks(line.channels));
  const bool odd = kernel(line, {random.flip() ? 40.0f : 3.0f, low, bits, 1}, pairs.data());
  // Lanes that fill up a block may have anything.
  std::vector<uint8_t> written;
  for (int64_t i = 0; i < line.padded / 2; ++i)
    for (int64_t o = 0; o < line.channels; ++o) {
      const int64_t at = o / LANE_BLOCK * LANE_BLOCK * line.padded + i * 64 + place_in_pair(o % LANE_BLOCK);
      written.insert(written.end(), {pairs[at], pairs[at + 1]});
    }
  return Written().add(written).add(odd);
}

}  // namespace

void check_square(Agreement& agreement) {
  agreement.check(square_kernel, 200, multiply);
  agreement.check(pair_pixels_kernel, 50, pair);
  agreement.check(quantize_pairs_kernel, 200, quantize);
}

}  // namespace bitorch_engine
