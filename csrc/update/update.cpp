#include "update/update.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<UpdateFunction> update_kernel{
    "update", {update_scalar, nullptr, BE_X86(update_avx2), BE_X86(update_avx512)}};
const Kernel<MeanSquareFunction> mean_square_kernel{
    "mean_square", {mean_square_scalar, nullptr, BE_X86(mean_square_avx2), BE_X86(mean_square_avx512)}};
const Kernel<WithinFunction> within_kernel{
    "within", {within_scalar, nullptr, BE_X86(within_avx2), BE_X86(within_avx512)}};

namespace {

constexpr int64_t GRAIN = 1 << 13;      // elements that a thread takes at least
constexpr int64_t MIXED = 16;           // blocks of several rows each, for which rates are laid out at a time
constexpr float LARGEST_RATE = 1e30f;   // so that 0 times the rate is 0

}  // namespace

// A whole step, as bitorch_engine/ops/cpu/update.py fills it in.
struct Step {
  StepRule rule;
  float levels;       // levels a step of the code is worth, see level_rate
  float factor;       // rate of a row: levels / scale * factor
  float row_least;    // added to the root of the row's second moment, where there is one
  int64_t rows, columns;
  uint8_t *packed, *residual;
  const float* scale;
  const void* grad;
  void *first, *second;
  const float* row_second;  // a second moment with one float a row, or null
};

namespace {

class Stepper {
 public:
  explicit Stepper(const Step& step) : step_(step), kernel_(update_kernel.pick()) {}

  // Rows first .. last - 1, of which the first one starts a block, and the last one ends a block or the weight.
  void run(int64_t first, int64_t last) { run_elements(first * step_.columns, last * step_.columns); }

 private:
  const Step& step_;
  UpdateFunction kernel_;
  alignas(64) float rates_[MIXED * BLOCK];

  const void* grad_at(int64_t element) const {
    return static_cast<const uint8_t*>(step_.grad) + element * (step_.rule.grad_bf16 ? 2 : 4);
  }

  float rate(int64_t row) const {
    float rate = step_.levels / step_.scale[row] * step_.factor;
    if (step_.row_second) rate /= std::sqrt(step_.row_second[row]) + step_.row_least;
    return std::min(std::max(rate, -LARGEST_RATE), LARGEST_RATE) * 0x1p23f;
  }

  // The rates of `count` elements, one an element.
  void lay_out_rates(int64_t start, int64_t count) {
    for (int64_t at = 0; at < count;) {
      const int64_t row = (start + at) / step_.columns;
      const int64_t end = std::min(count, (row + 1) * step_.columns - start);
      std::fill(rates_ + at, rates_ + end, rate(row));
      at = end;
    }
  }

  void run_elements(int64_t start, int64_t stop) {
    const int64_t whole_end = stop - stop % BLOCK;
    while (start < whole_end) {
      const int64_t row_end = std::min(whole_end, (start / step_.columns + 1) * step_.columns);
      int64_t count = (row_end - start) / BLOCK, stride = 0;
      if (count > 0) {
        lay_out_rates(start, BLOCK);
      } else {  // the row ends within this block: go on up to a block that lies in one row
        do {
          ++count;
        } while (count < MIXED && start + (count + 1) * BLOCK <= whole_end && !in_one_row(start + count * BLOCK));
        stride = BLOCK;
        lay_out_rates(start, count * BLOCK);
      }
      kernel_(step_.rule, blocks(start, count, stride));
      start += count * BLOCK;
    }
    if (start < stop) run_rest(start, stop - start);
  }

  bool in_one_row(int64_t start) const { return start / step_.columns == (start + BLOCK - 1) / step_.columns; }

  Blocks blocks(int64_t start, int64_t count, int64_t stride) const {
    const StepRule& rule = step_.rule;
    return {step_.packed + start / 8 * rule.bits,
            step_.residual + start / 8 * (8 - rule.bits),
            grad_at(start),
            static_cast<uint8_t*>(step_.first) + start / BLOCK * moment_bytes(rule.first),
            static_cast<uint8_t*>(step_.second) + start / BLOCK * moment_bytes(rule.second),
            rates_,
            stride,
            start,
            count};
  }

  // The last block of the weight, which is not full: through copies that are filled up with zeros, and zeros stay.
  void run_rest(int64_t start, int64_t count) {
    const StepRule& rule = step_.rule;
    alignas(64) uint8_t packed[BLOCK] = {}, residual[BLOCK] = {}, grad[4 * BLOCK] = {}, first[4 * BLOCK] = {},
                        second[4 * BLOCK] = {};
    Blocks rest = blocks(start, 1, 0);
    const auto stored = [=](MomentKind kind) {
      return kind == MOMENT_8BIT ? size_t{BLOCK_ROW} : static_cast<size_t>(moment_bytes(kind) / BLOCK * count);
    };
    const size_t packed_bytes = (count * rule.bits + 7) / 8, residual_bytes = (count * (8 - rule.bits) + 7) / 8;
    std::memcpy(packed, rest.packed, packed_bytes);
    if (residual_bytes) std::memcpy(residual, rest.residual, residual_bytes);
    std::memcpy(grad, rest.grad, count * (rule.grad_bf16 ? 2 : 4));
    if (rule.first != NONE) std::memcpy(first, rest.first, stored(rule.first));
    if (rule.second != NONE) std::memcpy(second, rest.second, stored(rule.second));
    std::fill(rates_, rates_ + BLOCK, 0.0f);
    lay_out_rates(start, count);
    kernel_(rule, {packed, residual, grad, first, second, rates_, 0, start, 1});
    std::memcpy(rest.packed, packed, packed_bytes);
    if (residual_bytes) std::memcpy(rest.residual, residual, residual_bytes);
    if (rule.first != NONE) std::memcpy(rest.first, first, stored(rule.first));
    if (rule.second != NONE) std::memcpy(rest.second, second, stored(rule.second));
  }
};

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT void be_update(const Step* step, int threads) {
  if (step->rows == 0 || step->columns == 0) return;
  // Threads take whole rows that fill whole blocks, so that no two write to one byte.
  const int64_t grain = BLOCK / std::gcd(step->columns, BLOCK);
  const int64_t rows = std::max<int64_t>(grain, GRAIN / (grain * step->columns) * grain);
  parallel_for(step->rows, rows, threads, [=](int64_t first, int64_t last) { Stepper(*step).run(first, last); });
}

BE_EXPORT int be_within(const float* values, int64_t count, float limit, int threads) {
  const auto kernel = within_kernel.pick();
  std::atomic<int> all{1};
  parallel_for(count, 1 << 16, threads, [&](int64_t first, int64_t last) {
    if (!kernel(values + first, last - first, limit)) all = 0;
  });
  return all;
}

// squares: one a row, of a gradient times the factor.
BE_EXPORT void be_mean_squares(const void* grad, int bf16, float factor, int64_t rows, int64_t columns, float* squares,
                               int threads) {
  const auto kernel = mean_square_kernel.pick();
  parallel_for(rows, GRAIN / columns + 1, threads, [=](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[mean_square_scratch(columns)]);
    const uint8_t* values = static_cast<const uint8_t*>(grad);
    const int64_t bytes = columns * (bf16 ? 2 : 4), quarter = (last - first) / 4;
    // In turn one row of each quarter of them, for the processor to fetch four streams, which are faster than one.
    for (int64_t i = 0; i < last - first; ++i) {
      const int64_t turn = i % 4, row = i < 4 * quarter ? first + turn * quarter + i / 4 : first + i;
      const uint8_t* ahead = values + (first + i / 4 + 1) * bytes + turn * bytes / 4;
      squares[row] = kernel(values + row * bytes, bf16, factor, columns, scratch.get(), ahead, quarter * bytes);
    }
  });
}
