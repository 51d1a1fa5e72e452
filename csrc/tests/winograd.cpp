#include "winograd/winograd.h"

#include "agreement.h"
#include "qconv/product.h"
#include "runtime/round_up.h"
#include "winograd/gradient.h"

namespace bitorch_engine {
namespace {

using namespace winograd;

std::vector<int16_t> words(Random& random, int64_t count, int64_t largest) {
  std::vector<int16_t> all(count);
  for (int16_t& word : all) word = static_cast<int16_t>(random.between(-largest, largest));
  return all;
}

Written weights(WeightsFunction kernel, Random& random) {
  const int64_t depth = 4 * random.between(1, 20), padded = round_up(depth, UNIT);
  const int64_t step = (depth + 4 * random.between(0, 9)) * BLOCK;
  std::vector<int8_t> block(9 * step);
  for (int8_t& code : block) code = static_cast<int8_t>(random.between(-128, 127));
  std::vector<int16_t> out(PLACES * pitch_of(padded * BLOCK));
  kernel(block.data(), step, depth, padded, out.data());
  return Written().add(out);
}

Written pixels(PixelsFunction kernel, Random& random) {
  const int64_t depth = UNIT * random.between(1, 5), pitch = pitch_of(depth * random.between(1, 3));
  const std::vector<uint8_t> image = random.bytes(6000);
  const uint8_t* lines[READ];
  int64_t columns[READ];
  for (const uint8_t*& line : lines) line = image.data() + random.between(0, 3000);
  for (int64_t& column : columns) column = random.between(0, 2800);
  std::vector<int16_t> out(PLACES * pitch);
  kernel(lines, columns, depth, out.data(), pitch);
  return Written().add(out);
}

Written multiply(MultiplyFunction kernel, Random& random) {
  const int64_t tiles = random.between(1, 15), depth = UNIT * random.between(1, 4), pitch = pitch_of(tiles * depth);
  const std::vector<int16_t> of_pixels = words(random, PLACES * pitch, 68 * 255);
  const std::vector<int16_t> of_weights = words(random, PLACES * pitch_of(depth * BLOCK), 49 * 128);
  std::vector<int32_t> sums(PLACES * tiles * BLOCK, 1 << 30);
  kernel(of_pixels.data(), pitch, of_weights.data(), tiles, depth, random.flip(), sums.data());
  return Written().add(sums);
}

Written totals(TotalsFunction kernel, Random& random) {
  const int64_t tiles = random.between(1, 15), first = random.between(0, tiles - 1);
  const int64_t count = random.between(1, tiles - first);
  std::vector<int32_t> sums(PLACES * tiles * BLOCK), out(SIDE * SIDE * count * COLUMNS, 1 << 25);
  for (int32_t& sum : sums) sum = static_cast<int32_t>(random.bits());
  kernel(sums.data(), tiles, first, count, random.flip(), out.data());
  return Written().add(out);
}

Written pixel_pair(PixelPairFunction kernel, Random& random) {
  const std::vector<uint8_t> image = random.bytes(6000);
  const int64_t pitch = pitch_of(2 * UNIT * random.between(1, 9));
  const uint8_t* lines[2][READ];
  int64_t columns[2][READ];
  for (int64_t i = 0; i < 2 * READ; ++i) {
    lines[i / READ][i % READ] = image.data() + random.between(0, 3000);
    columns[i / READ][i % READ] = random.between(0, 2900);
  }
  std::vector<int16_t> out(PLACES * pitch);
  kernel(lines, columns, out.data(), pitch);
  return Written().add(out);
}

Written gradient_pair(GradientPairFunction kernel, Random& random) {
  const int64_t pitch = pitch_of(2 * UNIT * random.between(1, 9));
  int8_t gradients[2][SQUARE][UNIT];
  for (int64_t i = 0; i < 2 * SQUARE * UNIT; ++i)
    gradients[i / SQUARE / UNIT][i / UNIT % SQUARE][i % UNIT] = static_cast<int8_t>(random.between(-128, 127));
  std::vector<int16_t> out(PLACES * pitch);
  kernel(gradients, out.data(), pitch);
  return Written().add(out);
}

Written multiply_pairs(MultiplyPairsFunction kernel, Random& random) {
  const int64_t pairs = random.between(1, 32), pitch = pitch_of(2 * UNIT * pairs);
  const std::vector<int16_t> gradients = words(random, PLACES * pitch, 225 * 128);
  const std::vector<int16_t> of_pixels = words(random, PLACES * pitch, 68 * 255);
  std::vector<int32_t> sums(PLACES * UNIT * UNIT);
  kernel(gradients.data(), of_pixels.data(), pairs, pitch, sums.data());
  return Written().add(sums);
}

Written taps(TapsFunction kernel, Random& random) {
  std::vector<int32_t> sums(PLACES * UNIT * UNIT), out(UNIT * TAPS * UNIT);
  for (int32_t& sum : sums) sum = static_cast<int32_t>(random.bits());
  kernel(sums.data(), out.data());
  return Written().add(out);
}

}  // namespace

void check_winograd(Agreement& agreement) {
  agreement.check(weights_kernel, 100, weights);
  agreement.check(pixels_kernel, 100, pixels);
  agreement.check(winograd::multiply_kernel, 100, multiply);
  agreement.check(totals_kernel, 100, totals);
  agreement.check(pixel_pair_kernel, 100, pixel_pair);
  agreement.check(gradient_pair_kernel, 100, gradient_pair);
  agreement.check(multiply_pairs_kernel, 100, multiply_pairs);
  agreement.check(taps_kernel, 100, taps);
}

}  // namespace bitorch_engine
