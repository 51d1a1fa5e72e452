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
  const int64_t columns = 8 * random.between(1, 200), rows = random.between(1, 5), row_bytes = columns / 8 * bits;
  const std::vector<uint8_t> packed = random.bytes(rows * row_bytes);
  const std::vector<float> x = random.numbers(columns, 1);
  const int64_t groups = (columns + GROUP - 1) / GROUP;
  std::vector<int8_t> digits(groups * GROUP * 3);
  std::vector<int32_t> corrections(groups * 48);
  std::vector<float> scales(groups * 3), sums(rows);
  const Digits to{digits.data(), corrections.data(), scales.data(), columns};
  if (!split(x.data(), bits, to)) return {};
  dot(packed.data(), row_bytes, rows, bits, to, sums.data());
  double sizes = 0;
  for (float one : x) sizes += std::fabs(one) * (1 << (bits - 1));
  std::vector<Near> found;
  for (float sum : sums) found.push_back({sum, sizes * 0x1p-21});
  return found;
}

}  // namespace

void check_linear(Agreement& agreement) {
  agreement.check(split_digits_kernel, 200, [](SplitDigitsFunction split, Random& random) {
    return multiply(split, dot_digits_kernel.pick(), random);
  });
  agreement.check(dot_digits_kernel, 200, [](DotDigitsFunction dot, Random& random) {
    return multiply(split_digits_kernel.pick(), dot, random);
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
