#include "linear/linear.h"

#include <algorithm>
#include <cmath>

#include "agreement.h"
#include "runtime/round_up.h"

namespace bitorch_engine {
namespace {

// Sums of floats come in another order on every instruction set.
struct Near {
  double value, error;
  bool operator==(const Near& other) const { return std::fabs(value - other.value) <= error + other.error; }
};

// Digits have another order on every instruction set: splitting and multiplying are checked together.
std::vector<Near> multiply(SplitDigitsFunction split, DotDigitsFunction dot, Random& random) {
  const int bits = 1 << random.between(0, 2), count = static_cast<int>(random.between(2, 4));
  const int64_t group = random.between(0, 1) << random.between(5, 10), channels = CHANNELS * random.between(1, 3);
  const int64_t columns = group ? group * random.between(1, 6) : random.between(1, 1600),
                rows = random.between(1, 4);
  const int64_t row_bytes = (columns * bits + 7) / 8, groups = (columns + GROUP - 1) / GROUP, pieces = groups * GROUP / 32;
  const std::vector<uint8_t> packed = random.bytes(channels * row_bytes);
  const std::vector<float> x = random.numbers(rows * columns, 1);
  std::vector<int8_t> digits(rows * groups * GROUP * 4);
  std::vector<uint8_t> corrections(rows * pieces * 4 * WIDEST);
  std::vector<float> scales(rows * groups * 4), sums(rows * channels);
  std::vector<Digits> to;
  for (int64_t r = 0; r < rows; ++r) {
    to.push_back({digits.data() + r * groups * GROUP * 4, corrections.data() + r * pieces * 4 * WIDEST,
                  scales.data() + r * groups * 4, columns, group, count, 4});
    if (!split(x.data() + r * columns, bits, to.back())) return {};
  }
  const int64_t scale_count = group ? columns / group : 0;
  const std::vector<float> weight_scales = random.numbers(channels * scale_count, 1);
  std::vector<const uint8_t*> weights;
  std::vector<const float*> scales_of;
  for (int64_t c = 0; c < channels; ++c) {
    weights.push_back(packed.data() + c * row_bytes);
    scales_of.push_back(weight_scales.data() + c * scale_count);
  }
  const float* const* of_groups = group ? scales_of.data() : nullptr;
  dot({weights.data(), of_groups, channels, row_bytes, bits, nullptr}, to.data(), rows, sums.data());
  float largest = group ? 0 : 1;
  for (float scale : weight_scales) largest = std::max(largest, std::fabs(scale));
  std::vector<Near> found;
  for (int64_t r = 0; r < rows; ++r) {
    double sizes = 0;
    for (int64_t k = 0; k < columns; ++k) sizes += std::fabs(x[r * columns + k]) * (1 << (bits - 1)) * largest;
    for (int64_t c = 0; c < channels; ++c)
      found.push_back({sums[r * channels + c], sizes * (count == 2 ? 0x1p-14 : 0x1p-21)});
  }
  return found;
}

// Products of codes, which are exact.
std::vector<float> multiply_bytes(SplitBytesFunction split, DotDigitsFunction dot, Random& random) {
  const int bits = 1 << random.between(0, 2);
  const int64_t columns = random.between(1, 4096), row_bytes = (columns * bits + 7) / 8;
  const int64_t groups = (columns + GROUP - 1) / GROUP;
  const std::vector<uint8_t> packed = random.bytes(CHANNELS * row_bytes), bytes = random.bytes(columns);
  std::vector<int8_t> digits(groups * GROUP * 2);
  std::vector<uint8_t> corrections(groups * 3 * WIDEST);
  std::vector<float> scales(groups * 3), sums(CHANNELS);
  const int zero = random.flip() ? 128 : static_cast<int>(random.between(0, 128));
  Digits to{digits.data(), corrections.data(), scales.data(), columns, 0, 1, 0};
  if (!split(bytes.data(), zero, bits, to)) {
    to.count = 2;
    split(bytes.data(), zero, bits, to);
  }
  const uint8_t* weights[CHANNELS];
  for (int64_t c = 0; c < CHANNELS; ++c) weights[c] = packed.data() + c * row_bytes;
  dot({weights, nullptr, CHANNELS, row_bytes, bits, nullptr}, &to, 1, sums.data());
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
    const int64_t group = random.between(0, 1) << random.between(5, 10), rows = random.between(1, MOST_ROWS);
    const int64_t columns = group ? group * random.between(1, 4) : random.between(0, 1600);
    const int64_t row_bytes = (columns * bits + 7) / 8, width = round_up(columns, COLUMN_BLOCK);
    const std::vector<uint8_t> packed = random.bytes(CHANNELS * row_bytes);
    const int64_t groups = group ? columns / group : 0;
    std::vector<float> x = random.numbers(rows * width, 1);
    for (int64_t k = 0; k < rows * width; ++k)
      if (k % width >= columns) x[k] = 0;
    const std::vector<float> scales = random.numbers(CHANNELS * groups, 1);
    const uint8_t* weights[CHANNELS];
    const float* scales_of[CHANNELS];
    for (int64_t c = 0; c < CHANNELS; ++c) {
      weights[c] = packed.data() + c * row_bytes;
      scales_of[c] = scales.data() + c * groups;
    }
    std::vector<const float*> of_row;
    for (int64_t r = 0; r < rows; ++r) of_row.push_back(x.data() + r * width);
    float sums[MOST_ROWS * CHANNELS];
    const uint8_t* end = packed.data() + packed.size();
    const WeightRows all{weights, group ? scales_of : nullptr, CHANNELS, row_bytes, bits, end};
    dot(all, columns, group, of_row.data(), rows, sums);
    std::vector<Near> found;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < CHANNELS; ++c) {
        double sizes = 0;
        for (int64_t k = 0; k < columns; ++k)
          sizes += std::fabs(x[r * width + k] * (group ? scales_of[c][k / group] : 1)) * (1 << (bits - 1));
        found.push_back({sums[r * CHANNELS + c], sizes * 0x1p-21});
      }
    return found;
  });
}

}  // namespace bitorch_engine
