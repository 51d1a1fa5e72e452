#include "linear/linear.h"

#include <vector>

#include "runtime/buffer.h"
#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<SplitDigitsFunction> split_digits_kernel{
    "linear.split_digits",
    {split_digits_scalar, nullptr, BE_X86(split_digits_avx2), BE_X86(split_digits_avx512)}};
const Kernel<DotDigitsFunction> dot_digits_kernel{
    "linear.dot_digits", {dot_digits_scalar, nullptr, BE_X86(dot_digits_avx2), BE_X86(dot_digits_avx512)}};
const Kernel<DotFunction> dot_kernel{"linear.dot", {dot_scalar, nullptr, BE_X86(dot_avx2), BE_X86(dot_avx512)}};

namespace {

constexpr int64_t WEIGHTS = 1 << 16;  // that a thread takes at least
constexpr int64_t AT_ONCE = 16;       // channels: all rows of x are multiplied with them while they are near

// Rows of activations as digits, one after the other.
struct DigitRows {
  int64_t columns, groups;
  Buffer<int8_t> digits;
  Buffer<int32_t> corrections;
  Buffer<float> scales;

  DigitRows(int64_t rows, int64_t columns)
      : columns(columns),
        groups((columns + GROUP - 1) / GROUP),
        digits(new_buffer<int8_t>(rows * groups * GROUP * 3)),
        corrections(new_buffer<int32_t>(rows * groups * 48)),
        scales(new_buffer<float>(rows * groups * 3)) {}

  Digits row(int64_t r) const {
    return {digits.get() + r * groups * GROUP * 3, corrections.get() + r * groups * 48,
            scales.get() + r * groups * 3, columns};
  }
};

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (rows, columns).  packed: `channels` rows of `columns` codes, each of whole bytes.  bias: or null.
// out: (rows, channels).
BE_EXPORT void be_linear(const float* x, int64_t rows, const uint8_t* packed, const float* scale, const float* bias,
                         int64_t channels, int64_t columns, int bits, float* out, int threads) {
  const int64_t row_bytes = columns * bits / 8, grain = (1 + WEIGHTS / (columns + 1) + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  const DigitRows digits(has_whole_values(bits) ? rows : 0, columns);
  std::vector<bool> exact(rows);
  const auto split = split_digits_kernel.pick();
  for (int64_t r = 0; r < rows; ++r) exact[r] = has_whole_values(bits) && split(x + r * columns, bits, digits.row(r));
  const auto dot_digits = dot_digits_kernel.pick();
  const auto dot = dot_kernel.pick();
  parallel_for(channels, grain, threads, [&](int64_t first, int64_t last) {
    float sums[AT_ONCE];
    for (int64_t c = first; c < last; c += AT_ONCE) {
      const int64_t some = std::min(AT_ONCE, last - c);
      const uint8_t* weights = packed + c * row_bytes;
      for (int64_t r = 0; r < rows; ++r) {
        if (exact[r]) dot_digits(weights, row_bytes, some, bits, digits.row(r), sums);
        for (int64_t i = 0; i < some; ++i) {
          if (!exact[r]) sums[i] = dot(weights + i * row_bytes, x + r * columns, columns, bits);
          const float value = sums[i] * scale[c + i];
          out[r * channels + c + i] = bias ? value + bias[c + i] : value;
        }
      }
    }
  });
}

// All that a call of be_linear reads but x; ops/cpu/linear.py has the same fields.
struct PlannedLinear {
  int64_t rows;
  const uint8_t* packed;
  const float *scale, *bias;
  int64_t channels, columns, bits, threads;
};

BE_EXPORT int be_linear_planned(const PlannedLinear* p, const void* x, void* out) {
  be_linear(static_cast<const float*>(x), p->rows, p->packed, p->scale, p->bias, p->channels, p->columns,
            static_cast<int>(p->bits), static_cast<float*>(out), static_cast<int>(p->threads));
  return 0;
}
