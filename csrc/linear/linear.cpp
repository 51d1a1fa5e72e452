#include "linear/linear.h"

#include <cstring>
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

constexpr int64_t LONG_ROW = 512;  // bytes of weights, more than which are read four rows at a time

// Columns of activations that become digits. Those are off by 2**-25 of the largest one, which in shorter sums can be
// more than twice what float32 loses.
constexpr int64_t FEWEST_COLUMNS = 128;

struct Weights {
  const uint8_t* packed;  // `channels` rows of `columns` codes, one after the other
  const float* scale;     // one a group, or a channel
  const float* bias;      // one a channel, or null
  int64_t channels, columns;
  int64_t group;  // columns with one scale, a power of two from 32; 0: all
  int bits;

  int64_t row_bytes() const { return (columns * bits + 7) / 8; }
  bool are_whole_bytes() const { return columns * bits % 8 == 0; }
  // Bits of the stream before a row, and the bytes that it fills.
  int64_t place(int64_t channel) const { return channel * columns * bits; }
  const uint8_t* end() const { return packed + (place(channels) + 7) / 8; }
  const float* scales(int64_t channel) const { return scale + channel * (group ? columns / group : 1); }
  // sum: of codes, or with groups of weights.
  void put(float sum, int64_t channel, float* out) const {
    const float value = group ? sum : sum * scale[channel];
    out[channel] = bias ? value + bias[channel] : value;
  }
};

// A row that begins within a byte, moved to `out`, as whole bytes; what follows the row in its last one stays there.
// Writes up to 15 bytes more.
void move_row(const Weights& weights, int64_t channel, uint8_t* out) {
  const uint8_t *from = weights.packed + weights.place(channel) / 8, *end = weights.end();
  const int64_t bytes = weights.row_bytes();
  const int shift = static_cast<int>(weights.place(channel) % 8);
  typedef uint64_t Words __attribute__((vector_size(16)));
  const int64_t readable = end - from - 8, whole = std::min(bytes + 15, readable) / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    Words words, next;
    std::memcpy(&words, from + i, 16);
    std::memcpy(&next, from + i + 8, 16);
    words = words >> shift | next << 1 << (63 - shift);
    std::memcpy(out + i, &words, 16);
  }
  for (int64_t i = std::max<int64_t>(whole, 0); i < bytes; ++i) {
    const int next = from + i + 1 < end ? from[i + 1] : 0;
    out[i] = static_cast<uint8_t>(from[i] >> shift | next << (8 - shift));
  }
}

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
  // Of each part at a time: of long rows that are read once, no more than a kernel multiplies together.
  const int64_t deep = (rows == 1 && weights.row_bytes() > LONG_ROW ? CHANNELS : MOST_CHANNELS) / parts;
  // Kernels read vectors that go beyond a row, if not beyond the end.
  const int64_t row_bytes = weights.row_bytes(), stride = row_bytes + 16, some_bytes = parts * deep * stride;
  const bool in_place = weights.are_whole_bytes();
  const Buffer<uint8_t> moved = new_buffer<uint8_t>(in_place ? 0 : some_bytes);
  float sums[MOST_ROWS * MOST_CHANNELS];
  for (int64_t from = 0; from < part; from += deep) {
    const int64_t count = round_up(parts * std::min(deep, part - from), CHANNELS);
    const uint8_t* packed[MOST_CHANNELS];
    const float* scales[MOST_CHANNELS];
    int64_t channel[MOST_CHANNELS];
    for (int64_t i = 0; i < count; ++i) {
      channel[i] = first + i % parts * part + from + i / parts;
      const int64_t present = std::min(channel[i], last - 1);
      scales[i] = weights.scales(present);
      if (in_place) {
        packed[i] = weights.packed + present * row_bytes;
      } else {
        packed[i] = moved.get() + i * stride;
        move_row(weights, present, moved.get() + i * stride);
      }
    }
    const WeightRows some{packed,       weights.group ? scales : nullptr,
                          count,        row_bytes,
                          weights.bits, in_place ? weights.end() : moved.get() + some_bytes};
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

// Copies a row of floats, and adds what dot_kernel asks for behind it.
const float* put_floats(const float* x, int64_t columns, float* out) {
  std::copy(x, x + columns, out);
  std::fill(out + columns, out + round_up(columns, COLUMN_BLOCK), 0.0f);
  return out;
}

// x: (rows, columns), as `count` digits, or one more where a few are far larger.  out: (rows, channels).  left: as of
// be_linear_digits, or null: then all rows are multiplied.
int64_t multiply(const Weights& weights, const float* x, int64_t rows, int count, float* out, uint8_t* left,
                 int threads) {
  const bool whole = has_whole_values(weights.bits) && weights.columns >= FEWEST_COLUMNS;
  const DigitRows digits(whole ? rows : 0, weights, count + 1);
  std::vector<Digits> exact;
  std::vector<float*> exact_out;
  const int64_t width = round_up(weights.columns, COLUMN_BLOCK);
  const Buffer<float> padded = new_buffer<float>(width > weights.columns ? rows * width : 0);
  std::vector<const float*> others;
  std::vector<float*> others_out;
  const auto split = split_digits_kernel.pick();
  for (int64_t r = 0; r < rows; ++r) {
    const float* values = x + r * weights.columns;
    Digits row = digits.row(r, count, 4);
    bool is_exact = whole && split(values, weights.bits, row);
    if (whole && !is_exact) {
      row = digits.row(r, count + 1, 12);
      is_exact = split(values, weights.bits, row);
    }
    if (is_exact) {
      exact.push_back(row);
      exact_out.push_back(out + r * weights.channels);
    } else {
      others.push_back(width > weights.columns ? put_floats(values, weights.columns, padded.get() + r * width) : values);
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

// x: (rows, columns).  packed: one stream of `channels` rows of `columns` codes.  bias: or null.
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

// A linear layer of one row of float32 that is quantized, where floats hold every sum; ops/cpu/linear.py has the same
// fields, and says where that is.
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
  const int zero = x_bits == 1 ? 1 : static_cast<int>(-*p->low);
  const std::vector<float*> to{static_cast<float*>(out)};
  const auto for_channels = [&](const auto& body) {
    parallel_for(p->channels, 1 + WEIGHTS / (p->columns + 1), static_cast<int>(p->threads), body);
  };
  if (!has_whole_values(bits)) {
    const int64_t width = round_up(p->columns, COLUMN_BLOCK);
    const Buffer<float> values = new_buffer<float>(width);
    for (int64_t k = 0; k < width; ++k) values[k] = k < p->columns ? static_cast<float>(codes[k] - zero) : 0.0f;
    const std::vector<const float*> row{values.get()};
    for_channels([&](int64_t first, int64_t last) { multiply_floats(weights, row, to, first, last); });
    return DONE;
  }
  const DigitRows digits(1, weights, 2);
  const auto split = split_bytes_kernel.pick();
  std::vector<Digits> row{digits.row(0, 1, 0)};
  if (!split(codes.get(), zero, bits, row[0])) {
    row[0] = digits.row(0, 2, 0);
    split(codes.get(), zero, bits, row[0]);
  }
  for_channels([&](int64_t first, int64_t last) { multiply_digits(weights, row, to, first, last); });
  return DONE;
}
