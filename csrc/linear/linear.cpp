#include "linear/linear.h"

#include <vector>

#include "quantize/quantize.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"
#include "runtime/watch.h"

namespace bitorch_engine {

const Kernel<SplitDigitsFunction> split_digits_kernel{
    "linear.split_digits",
    {split_digits_scalar, nullptr, BE_X86(split_digits_avx2), BE_X86(split_digits_avx512)}};
const Kernel<SplitBytesFunction> split_bytes_kernel{
    "linear.split_bytes", {split_bytes_scalar, nullptr, BE_X86(split_bytes_avx2), BE_X86(split_bytes_avx512)}};
const Kernel<DotDigitsFunction> dot_digits_kernel{
    "linear.dot_digits", {dot_digits_scalar, nullptr, BE_X86(dot_digits_avx2), BE_X86(dot_digits_avx512)}};
const Kernel<DotFunction> dot_kernel{"linear.dot", {dot_scalar, nullptr, BE_X86(dot_avx2), BE_X86(dot_avx512)}};

namespace {

constexpr int64_t WEIGHTS = 1 << 16;  // that a thread takes at least

// Columns of activations that become digits. Those are off by 2**-25 of the largest one, which in shorter sums can be
// more than twice what float32 loses.
constexpr int64_t FEWEST_COLUMNS = 128;

struct Weights {
  const uint8_t* packed;  // `channels` rows of `columns` codes, each of whole bytes
  const float* scale;     // one a group, or a channel
  const float* bias;      // one a channel, or null
  int64_t channels, columns;
  int64_t group;  // columns with one scale, a power of two from 32; 0: all
  int bits;

  int64_t row_bytes() const { return columns * bits / 8; }
  const uint8_t* row(int64_t channel) const { return packed + channel * row_bytes(); }
  const float* scales(int64_t channel) const { return scale + channel * (group ? columns / group : 1); }
  // sum: of codes, or with groups of weights.
  void put(float sum, int64_t channel, float* out) const {
    const float value = group ? sum : sum * scale[channel];
    out[channel] = bias ? value + bias[channel] : value;
  }
};

// Rows of activations as up to `most` digits, one after the other.
struct DigitRows {
  int64_t columns, group, groups, pieces;
  int most;
  Buffer<int8_t> digits;
  Buffer<uint8_t> corrections;
  Buffer<float> scales;

  DigitRows(int64_t rows, const Weights& weights, int most)
      : columns(weights.columns),
        group(weights.group),
        groups((columns + GROUP - 1) / GROUP),
        pieces(groups * (GROUP / piece_columns(group, 8, WIDEST / 2))),  // of the shortest vectors, at most
        most(most),
        digits(new_buffer<int8_t>(rows * groups * GROUP * most)),
        corrections(new_buffer<uint8_t>(rows * pieces * most * WIDEST)),
        scales(new_buffer<float>(rows * groups * most)) {}

  Digits row(int64_t r, int count, uint32_t powers) const {
    return {digits.get() + r * groups * GROUP * most, corrections.get() + r * pieces * most * WIDEST,
            scales.get() + r * groups * most, columns, group, count, powers};
  }
};

// Channels first .. last - 1 of all rows of results. dot(weights, r, sums): multiplies some weights and the activations
// of at most MOST_ROWS rows from r, and returns how many.
template <class Dot>
void multiply_channels(const Weights& weights, const std::vector<float*>& out, int64_t first, int64_t last,
                       const Dot& dot) {
  const int64_t rows = static_cast<int64_t>(out.size());
  // Channels come from four parts in turn: processors fetch four streams faster than one.
  constexpr int64_t parts = CHANNELS;
  const int64_t part = (last - first + parts - 1) / parts;
  const int64_t deep = (rows == 1 ? CHANNELS : MOST_CHANNELS) / parts;  // of each part at a time
  float sums[MOST_ROWS * MOST_CHANNELS];
  for (int64_t from = 0; from < part; from += deep) {
    const int64_t count = round_up(parts * std::min(deep, part - from), CHANNELS);
    const uint8_t* packed[MOST_CHANNELS];
    const float* scales[MOST_CHANNELS];
    int64_t channel[MOST_CHANNELS];
    for (int64_t i = 0; i < count; ++i) {
      channel[i] = first + i % parts * part + from + i / parts;
      packed[i] = weights.row(std::min(channel[i], last - 1));
      scales[i] = weights.scales(std::min(channel[i], last - 1));
    }
    const WeightRows some{packed,       weights.group ? scales : nullptr, count, weights.row_bytes(),
                          weights.bits, weights.row(weights.channels)};
    for (int64_t r = 0, done; r < rows; r += done) {
      done = dot(some, r, sums);
      for (int64_t k = 0; k < done; ++k)
        for (int64_t i = 0; i < count; ++i)
          if (channel[i] < last) weights.put(sums[k * count + i], channel[i], out[r + k]);
    }
  }
}

void multiply_digits(const Weights& weights, const std::vector<Digits>& x, const std::vector<float*>& out,
                     int64_t first, int64_t last) {
  const auto dot = dot_digits_kernel.pick();
  multiply_channels(weights, out, first, last, [&](const WeightRows& some, int64_t r, float* sums) {
    const int64_t most = std::min(MOST_ROWS, static_cast<int64_t>(x.size()) - r);
    int64_t rows = 1;  // of as many digits
    while (rows < most && x[r + rows].count == x[r].count) ++rows;
    dot(some, x.data() + r, rows, sums);
    return rows;
  });
}

void multiply_floats(const Weights& weights, const std::vector<const float*>& x, const std::vector<float*>& out,
                     int64_t first, int64_t last) {
  const auto dot = dot_kernel.pick();
  multiply_channels(weights, out, first, last, [&](const WeightRows& some, int64_t r, float* sums) {
    const int64_t rows = std::min(MOST_ROWS, static_cast<int64_t>(x.size()) - r);
    dot(some, weights.columns, weights.group, x.data() + r, rows, sums);
    return rows;
  });
}

// x: (rows, columns), as `count` digits, or one more where a few are far larger.  out: (rows, channels).  left: as of
// be_linear_digits, or null: then all rows are multiplied.
int64_t multiply(const Weights& weights, const float* x, int64_t rows, int count, float* out, uint8_t* left,
                 int threads) {
  const bool whole = has_whole_values(weights.bits) && weights.columns >= FEWEST_COLUMNS;
  const DigitRows digits(whole ? rows : 0, weights, count + 1);
  std::vector<Digits> exact;
  std::vector<float*> exact_out;
  std::vector<const float*> others;
  std::vector<float*> others_out;
  const auto split = split_digits_kernel.pick();
  for (int64_t r = 0; r < rows; ++r) {
    Digits row = digits.row(r, count, 4);
    bool is_exact = whole && split(x + r * weights.columns, weights.bits, row);
    if (whole && !is_exact) {
      row = digits.row(r, count + 1, 12);
      is_exact = split(x + r * weights.columns, weights.bits, row);
    }
    if (is_exact) {
      exact.push_back(row);
      exact_out.push_back(out + r * weights.channels);
    } else {
      others.push_back(x + r * weights.columns);
      others_out.push_back(out + r * weights.channels);
    }
    if (left) left[r] = !is_exact;
  }
  parallel_for(weights.channels, 1 + WEIGHTS / (weights.columns + 1), threads, [&](int64_t first, int64_t last) {
    if (!exact.empty()) multiply_digits(weights, exact, exact_out, first, last);
    if (!others.empty() && !left) multiply_floats(weights, others, others_out, first, last);
  });
  return static_cast<int64_t>(others.size());
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (rows, columns).  packed: `channels` rows of `columns` codes, each of whole bytes.  bias: or null.
// scale: (channels, columns / group), group a power of two from 32; or with a group of 0 (channels).
// digits: of an activation, 2 or 3.  out: (rows, channels).
BE_EXPORT void be_linear(const float* x, int64_t rows, const uint8_t* packed, const float* scale, const float* bias,
                         int64_t channels, int64_t columns, int64_t group, int bits, int digits, float* out,
                         int threads) {
  multiply({packed, scale, bias, channels, columns, group, bits}, x, rows, digits, out, nullptr, threads);
}

// The same, with one scale a channel, for rows whose activations are digits. left: one byte a row, 1 for those that are
// not, which out is left without. Returns how many these are.
BE_EXPORT int64_t be_linear_digits(const float* x, int64_t rows, const uint8_t* packed, const float* scale,
                                   const float* bias, int64_t channels, int64_t columns, int bits, int digits,
                                   float* out, uint8_t* left, int threads) {
  return multiply({packed, scale, bias, channels, columns, 0, bits}, x, rows, digits, out, left, threads);
}

// All that a call of be_linear reads but x; ops/cpu/linear.py has the same fields.
struct PlannedLinear {
  int64_t rows;
  const uint8_t* packed;
  const float *scale, *bias;
  int64_t channels, columns, bits, digits, threads;
};

BE_EXPORT int be_linear_planned(const PlannedLinear* p, const void* x, void* out) {
  be_linear(static_cast<const float*>(x), p->rows, p->packed, p->scale, p->bias, p->channels, p->columns,
            0, static_cast<int>(p->bits), static_cast<int>(p->digits), static_cast<float*>(out),
            static_cast<int>(p->threads));
  return DONE;
}

// A linear layer of one row of float32 that is quantized; ops/cpu/linear.py has the same fields.
struct PlannedCodes {
  Watch watch;
  const float *scale, *low;  // of the activation quantizer
  const uint8_t* packed;
  const float *factor, *bias;  // one a channel; bias: or null
  int64_t channels, columns, bits, x_bits, threads;
};

// The results of be_qconv, and nothing where it returns that they are not numbers.
BE_EXPORT int be_linear_codes(const PlannedCodes* p, const void* x, void* out) {
  if (p->watch.changed()) return CHANGED;
  const int bits = static_cast<int>(p->bits), x_bits = static_cast<int>(p->x_bits);
  const Buffer<uint8_t> codes = new_buffer<uint8_t>(p->columns + 64);
  const ActivationRule rule{1.0f / *p->scale, *p->low, x_bits, x_bits == 1 ? 2 : 1};
  const auto quantize = quantize_activation_kernel.pick();
  if (quantize(x, FLOAT32, p->columns, 1, 1, p->columns, rule, codes.get(), p->columns, nullptr)) return NOT_A_NUMBER;
  const Buffer<float> factor = new_buffer<float>(p->channels);
  for (int64_t c = 0; c < p->channels; ++c) factor[c] = p->factor[c] * *p->scale;
  const Weights weights{p->packed, factor.get(), p->bias, p->channels, p->columns, 0, bits};
  const DigitRows digits(1, weights, 2);
  const auto split = split_bytes_kernel.pick();
  const int zero = x_bits == 1 ? 1 : static_cast<int>(-*p->low);
  std::vector<Digits> row{digits.row(0, 1, 0)};
  if (!split(codes.get(), zero, bits, row[0])) {
    row[0] = digits.row(0, 2, 0);
    split(codes.get(), zero, bits, row[0]);
  }
  const std::vector<float*> to{static_cast<float*>(out)};
  parallel_for(p->channels, 1 + WEIGHTS / (p->columns + 1), static_cast<int>(p->threads),
               [&](int64_t first, int64_t last) { multiply_digits(weights, row, to, first, last); });
  return DONE;
}
