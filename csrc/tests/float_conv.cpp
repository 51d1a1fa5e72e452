#include "float_conv/float_conv.h"

#include <cmath>

#include "agreement.h"
#include "runtime/round_up.h"

namespace bitorch_engine {
namespace {

// Products are rounded before they are added up, or not.
struct Near {
  double value, error;
  bool operator==(const Near& other) const { return std::fabs(value - other.value) <= error; }
};

std::vector<Near> multiply(MultiplyLineFunction kernel, Random& random) {
  ConvLine line{};
  line.channels_last = random.flip();
  line.depth = random.between(1, 60);
  line.pixels = random.between(1, 70);
  line.channels = random.between(1, 70);
  line.step = line.channels_last ? random.between(1, 9) : 1;
  line.pitch = (line.channels_last ? line.channels : line.pixels) + random.between(0, 5);
  const int64_t padded = round_up(line.channels, FLOAT_BLOCK);
  const std::vector<float> image = random.numbers(line.depth + line.pixels * line.step + FLOAT_BLOCK, 3);
  const std::vector<float> weights = random.numbers(padded * line.depth, 1), start = random.numbers(padded, 2);
  std::vector<const float*> values(line.depth);
  for (const float*& value : values) value = image.data() + random.between(0, line.depth - 1);
  std::vector<float> out((line.channels_last ? line.pixels : line.channels) * line.pitch);
  line.values = values.data();
  line.weights = weights.data();
  line.start = start.data();
  line.out = out.data();
  kernel(line);
  std::vector<Near> found;
  double size = 0;
  for (float x : image) size = std::fmax(size, std::fabs(x));
  double largest = 0;
  for (float w : weights) largest = std::fmax(largest, std::fabs(w));
  for (float y : out) found.push_back({y, static_cast<double>(line.depth) * size * largest * 0x1p-20});
  return found;
}

}  // namespace

void check_float_conv(Agreement& agreement) { agreement.check(multiply_line_kernel, 300, multiply); }

}  // namespace bitorch_engine
