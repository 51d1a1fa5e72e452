#include "linear/linear.h"

#include <cmath>

#include "agreement.h"

namespace bitorch_engine {
namespace {

// Sums of floats come in another order on every instruction set.
struct Near {
  double value, error;
  bool operator==(const Near& other) const { return std::fabs(value - other.value) <= error + other.error; }
};

// Digits have another order on every instruction set: splitting and multiplying are checked together.
std::vector<Near> multiply(SplitDigitsFunction split, DotDigitsFunction dot, Random& random) {
  const int bits = 1 << random.between(0, 2);
  const int64_t columns = 8 * random.between(1, 200), channels = CHANNELS * random.between(1, 3);
  const int64_t rows = random.between(1, 4);
  const int64_t row_bytes = columns / 8 * bits, groups = (columns + GROUP - 1) / GROUP;
  const std::vector<uint8_t> packed = random.bytes(channels * row_bytes);
  const std::vector<float> x = random.numbers(rows * columns, 1);
  const int count = static_cast<int>(random.between(2, 3));
  std::vector<int8_t> digits(rows * groups * GROUP * 3);
  std::vector<uint8_t> corrections(rows * groups * 3 * WIDEST);
  std::vector<float> scales(rows * groups * 3), sums(rows * channels);
  std::vector<Digits> to;
  for (int64_t r = 0; r < rows; ++r) {
    to.push_back({digits.data() + r * groups * GROUP * 3, corrections.data() + r * groups * 3 * WIDEST,
                  scales.data() + r * groups * 3, columns, count});
    if (!split(x.data() + r * columns, bits, to.back())) return {};
  }
  std::vector<const uint8_t*> weights;
  for (int64_t c = 0; c < channels; ++c) weights.push_back(packed.data() + c * row_bytes);
  dot(weights.data(), channels, row_bytes, bits, to.data(), rows, sums.data());
  std::vector<Near> found;
  for (int64_t r = 0; r < rows; ++r) {
    double sizes = 0;
    for (int64_t k = 0; k < columns; ++k) sizes += std::fabs(x[r * columns + k]) * (1 << (bits - 1));
    for (int64_t c = 0; c < channels; ++c) found.push_back({sums[r * channels + c], sizes * (count == 2 ? 0x1p-14 : 0x1p-21)});
  }
  return found;
}

// Products of codes, which are exact.
std::vector<float> multiply_bytes(SplitBytesFunction split, DotDigitsFunction dot, Random& random) {
  const int bits = 1 << random.between(0, 2);
  const int64_t columns = 8 * random.between(1, 512), row_bytes = columns / 8 * bits;
  const int64_t groups = (columns + GROUP - 1) / GROUP;
  const std::vector<uint8_t> packed = random.bytes(CHANNELS * row_bytes), bytes = random.bytes(columns);
  std::vector<int8_t> digits(groups * GROUP * 2);
  std::vector<uint8_t> corrections(groups * 3 * WIDEST);
  std::vector<float> scales(groups * 3), sums(CHANNELS);
  const Digits to{digits.data(), corrections.data(), scales.data(), columns, 2};
  split(bytes.data(), static_cast<int>(random.between(0, 128)), bits, to);
  const uint8_t* weights[CHANNELS];
  for (int64_t c = 0; c < CHANNELS; ++c) weights[c] = packed.data() + c * row_bytes;
  dot(weights, CHANNELS, row_bytes, bits, &to, 1, sums.data());
  return sums;
}

}  // namespace

void check_linear(Agreement& agreement) {
  agreement.check(split_digits_kernel, 200, [](SplitDigitsFunction split, Random& random) {
    return multiply(split, dot_digits_kernel.pick(), random);
  });
  agreement.check(dot_digits_kernel, 200, [](DotDigitsFunction dot, Random& random) {
    return multiply(split_digits_kernel.pick(), dot, random);
  });
  agreement.check(split_bytes_kernel, 200, [](SplitBytesFunction split, Random& random) {
    return multiply_bytes(split, dot_digits_kernel.pick(), random);
  });
  agreement.check(dot_kernel, 200, [](DotFunction dot, Random& random) {
    const int bits = static_cast<int>(random.between(1, 8));
    const int64_t count = 8 * random.between(0, 200);
    const std::vector<uint8_t> packed = random.bytes(count / 8 * bits);
    const std::vector<float> x = random.numbers(count, 1);
    double sizes = 0;
    for (float one : x) sizes += std::fabs(one) * (1 << (bits - 1));
    return Near{dot(packed.data(), x.data(), count, bits), sizes * 0x1p-21};
  });
}

}  // namespace bitorch_engine
