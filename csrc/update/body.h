// The step, written as short loops over arrays that stay in the L1 cache: every compiler turns them into the vector
// instructions of the set that the including file is compiled for. Included once per instruction set.
//
// No operation here may be contracted or reordered: the result is the reference's, bit for bit.
#include <cmath>
#include <cstring>

#include "bits/bits.h"
#include "runtime/convert.h"
#include "runtime/noise.h"
#include "update/update.h"

namespace bitorch_engine {
namespace {

constexpr int64_t COUNT = 512;  // elements at a time: whole blocks of 128
constexpr int64_t BLOCK = 128, ROW = BLOCK + 4;  // an 8-bit moment: codes, then the block's unit

using Floats = float[COUNT];
using Words = uint32_t[COUNT];

void load_floats(const void* from, int dtype, int64_t start, int64_t count, float* to) {
  if (dtype == FLOAT32) {
    std::memcpy(to, static_cast<const float*>(from) + start, count * sizeof(float));
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + start;
    if (dtype == BFLOAT16)
      for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(halves[i]);
    else
      for (int64_t i = 0; i < count; ++i) to[i] = from_float16(halves[i]);
  }
}

void noise(uint32_t key, int64_t start, int64_t count, uint32_t* to) {
  // start is a multiple of 128, so the part above 32 bits is the same for all.
  const uint32_t low = static_cast<uint32_t>(start), high = hash32(static_cast<uint32_t>(start >> 32));
  for (int64_t i = 0; i < count; ++i) to[i] = hash32(((low + static_cast<uint32_t>(i)) ^ high) ^ key);
}

// 8-bit codes: the top bits of the float32 x + offset, less those of offset, where x is the value in the block's unit.
template <bool is_signed>
struct Companding {
  static constexpr uint32_t base = (127u - (is_signed ? 15 : 31)) << 3;  // bits of the offset, cut to 3 of the fraction
  static constexpr float offset = is_signed ? 0x1p-15f : 0x1p-31f;
};

template <bool is_signed>
void load_8bit(const uint8_t* stored, int64_t start, int64_t count, float* to) {
  using C = Companding<is_signed>;
  for (int64_t i = 0; i < count; i += BLOCK) {
    const uint8_t* codes = stored + (start + i) / BLOCK * ROW;
    float unit;
    std::memcpy(&unit, codes + BLOCK, sizeof unit);
    for (int64_t j = 0; j < BLOCK; ++j) {
      const uint32_t code = codes[j];
      const float size = (float_of(((is_signed ? code & 127 : code) + C::base) << 20) - C::offset) * unit;
      to[i + j] = is_signed ? float_of(bits_of(size) ^ (code & 128) << 24) : size;
    }
  }
}

template <bool is_signed>
void store_8bit(uint8_t* stored, int64_t start, int64_t count, const float* values, const uint32_t* noise) {
  using C = Companding<is_signed>;
  for (int64_t i = 0; i < count; i += BLOCK) {
    uint8_t* codes = stored + (start + i) / BLOCK * ROW;
    const float* v = values + i;
    uint32_t largest = 0;  // as integers, floats without sign are in order
    for (int64_t j = 0; j < BLOCK; ++j) {
      const uint32_t size = bits_of(v[j]) & 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    // The power of two above the largest, and its inverse, both normal numbers.
    uint32_t exponent = (largest >> 23) + 1;
    exponent = exponent < 2 ? 2 : exponent > 252 ? 252 : exponent;
    const float unit = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
    for (int64_t j = 0; j < BLOCK; ++j) {
      const uint32_t random = is_signed ? noise[i + j] & 0xfffff : noise[i + j] >> 12;
      const uint32_t sum = bits_of(std::fabs(v[j]) * inverse + C::offset) + random;
      uint32_t code = (sum >> 20) - C::base;
      if (is_signed) {
        code |= bits_of(v[j]) >> 24 & 128;
      } else {
        const uint32_t positive = v[j] > 0;
        code = code > positive ? code : positive;
      }
      codes[j] = static_cast<uint8_t>(code);
    }
    std::memcpy(codes + BLOCK, &unit, sizeof unit);
  }
}

template <bool is_signed>
void load_moment(const void* stored, int kind, int64_t start, int64_t count, float* to) {
  switch (kind) {
    case MOMENT_FLOAT32: return load_floats(stored, FLOAT32, start, count, to);
    case MOMENT_BFLOAT16: return load_floats(stored, BFLOAT16, start, count, to);
    case MOMENT_FLOAT16: return load_floats(stored, FLOAT16, start, count, to);
    default: return load_8bit<is_signed>(static_cast<const uint8_t*>(stored), start, count, to);
  }
}

// values and noise are filled up with zeros to a whole block.
template <bool is_signed>
void store_moment(void* stored, int kind, int64_t start, int64_t count, const float* values, const uint32_t* noise) {
  uint16_t* halves = static_cast<uint16_t*>(stored) + start;
  switch (kind) {
    case MOMENT_FLOAT32: std::memcpy(static_cast<float*>(stored) + start, values, count * sizeof(float)); return;
    case MOMENT_BFLOAT16:
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t random = is_signed ? noise[i] & 0xffff : noise[i] >> 16;
        halves[i] = static_cast<uint16_t>((bits_of(values[i]) + random) >> 16);
      }
      return;
    case MOMENT_FLOAT16:
      for (int64_t i = 0; i < count; ++i) {
        const float random = static_cast<float>(static_cast<int32_t>(is_signed ? noise[i] & 0xffff : noise[i] >> 16));
        const int32_t exponent = static_cast<int32_t>(bits_of(values[i]) >> 23 & 255) - 126;
        const int32_t at_least = exponent < -13 ? -13 : exponent;
        const float unit = float_of(static_cast<uint32_t>(at_least - 11 + 127) << 23);
        const float rounded = std::floor(values[i] / unit + random * 0x1p-16f) * unit;
        halves[i] = to_float16(rounded < -65504.0f ? -65504.0f : rounded > 65504.0f ? 65504.0f : rounded);
      }
      return;
    default: store_8bit<is_signed>(static_cast<uint8_t*>(stored), start, count, values, noise);
  }
}

// rates of the rows that elements start .. start + count - 1 belong to.
void spread_rates(const float* rates, int64_t columns, int64_t start, int64_t count, float* to) {
  int64_t row = start / columns, left = columns - start % columns;
  for (int64_t i = 0; i < count;) {
    const int64_t run = left < count - i ? left : count - i;
    for (int64_t j = 0; j < run; ++j) to[i + j] = rates[row];
    i += run;
    ++row;
    left = columns;
  }
}

void move_levels(const UpdateArguments& a, int64_t start, int64_t count, const float* moves, const uint32_t* random) {
  const int bits = static_cast<int>(a.bits), hidden = 8 - bits;
  uint8_t index[COUNT + 8], low[COUNT + 8], level[COUNT];
  const int64_t whole = count & ~int64_t{7};
  uint8_t* codes = a.packed + start / 8 * bits;
  uint8_t* rest = hidden ? a.residual + start / 8 * hidden : nullptr;
  const auto unpack = [&](const uint8_t* from, int width, uint8_t* to) {
    unpack_kernel.pick()(from, to, whole, width);
    if (whole < count) unpack_range(from, whole, count - whole, width, to + whole);
  };
  const auto pack = [&](const uint8_t* from, int width, uint8_t* to) {
    pack_kernel.pick()(from, to, whole, width);
    if (whole == count) return;
    uint8_t values[8] = {}, bytes[8];
    std::memcpy(values, from + whole, count - whole);
    pack_scalar(values, bytes, 8, width);
    std::memcpy(to + whole / 8 * width, bytes, ((count - whole) * width + 7) / 8);
  };
  unpack(codes, bits, index);
  if (hidden) {
    unpack(rest, hidden, low);
    for (int64_t i = 0; i < count; ++i) level[i] = static_cast<uint8_t>(index[i] << hidden | low[i]);
  } else {
    std::memcpy(level, index, count);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float uniform = static_cast<float>(static_cast<int32_t>(random[i] >> 8)) * 0x1p-24f;
    const float size = std::fabs(moves[i]);
    const float floor = std::floor(size);
    float steps = floor + (uniform < size - floor ? 1.0f : 0.0f);
    steps = steps < 255.0f ? steps : 255.0f;
    const float moved = static_cast<float>(static_cast<int32_t>(level[i])) + (moves[i] < 0 ? -steps : steps);
    const float kept = moved < 0.0f ? 0.0f : moved > 255.0f ? 255.0f : moved;
    level[i] = static_cast<uint8_t>(static_cast<int32_t>(kept));
  }
  for (int64_t i = 0; i < count; ++i) index[i] = static_cast<uint8_t>(level[i] >> hidden);
  pack(index, bits, codes);
  if (hidden) {
    const uint8_t mask = static_cast<uint8_t>((1 << hidden) - 1);
    for (int64_t i = 0; i < count; ++i) low[i] = level[i] & mask;
    pack(low, hidden, rest);
  }
}

bool needs_noise(int64_t kind) { return kind >= MOMENT_BFLOAT16 && kind <= MOMENT_8BIT; }

void update(const UpdateArguments& a, const float* rates, int64_t first, int64_t last) {
  alignas(64) Floats g, m, v, rate;
  alignas(64) Words random;
  const bool first_moment = a.l_kind != NO_MOMENT;
  const bool second_moment = a.s_kind != NO_MOMENT && a.s_kind != MOMENT_CHANNEL;
  for (int64_t start = first; start < last; start += COUNT) {
    const int64_t count = last - start < COUNT ? last - start : COUNT;
    load_floats(a.grad, static_cast<int>(a.grad_dtype), start, count, g);
    spread_rates(rates, a.columns, start, count, rate);
    if (a.add) {
      for (int64_t i = 0; i < count; ++i) g[i] = g[i] * rate[i];
    } else {
      for (int64_t i = 0; i < count; ++i) g[i] = g[i] * a.grad_factor;
      for (int64_t i = count; i < COUNT; ++i) g[i] = 0;
      if (needs_noise(a.s_kind) || needs_noise(a.l_kind)) noise(a.moment_key, start, COUNT, random);
      if (first_moment) {
        load_moment<true>(a.exp_avg_l, static_cast<int>(a.l_kind), start, count, m);
        for (int64_t i = 0; i < count; ++i) m[i] = m[i] * a.beta1 + g[i] * a.one_minus_beta1;
        for (int64_t i = count; i < COUNT; ++i) m[i] = 0;
        store_moment<true>(a.exp_avg_l, static_cast<int>(a.l_kind), start, count, m, random);
        for (int64_t i = 0; i < count; ++i) m[i] = m[i] * a.inverse_correction1;
      } else {
        std::memcpy(m, g, sizeof m);
      }
      if (second_moment) {
        load_moment<false>(a.exp_avg_s, static_cast<int>(a.s_kind), start, count, v);
        for (int64_t i = 0; i < count; ++i) v[i] = v[i] * a.beta2 + g[i] * g[i] * a.one_minus_beta2;
        for (int64_t i = count; i < COUNT; ++i) v[i] = 0;
        store_moment<false>(a.exp_avg_s, static_cast<int>(a.s_kind), start, count, v, random);
        for (int64_t i = 0; i < count; ++i) m[i] = m[i] / (std::sqrt(v[i] * a.inverse_correction2) + a.eps);
      }
      for (int64_t i = 0; i < count; ++i) g[i] = -(m[i] * rate[i]);
    }
    noise(a.code_key, start, count, random);
    move_levels(a, start, count, g, random);
  }
}

// The sum by halves, as ops/reference/update.py's tree_sum.
void row_moment(const UpdateArguments& a, float* squares, int64_t first, int64_t last) {
  float* moments = static_cast<float*>(a.exp_avg_s);
  for (int64_t row = first; row < last; ++row) {
    load_floats(a.grad, static_cast<int>(a.grad_dtype), row * a.columns, a.columns, squares);
    for (int64_t i = 0; i < a.columns; ++i) {
      const float g = squares[i] * a.grad_factor;
      squares[i] = g * g;
    }
    for (int64_t length = a.columns; length > 1;) {
      int64_t half = 1;
      while (2 * half < length) half *= 2;
      for (int64_t i = 0; i < length - half; ++i) squares[i] += squares[half + i];
      length = half;
    }
    const float mean = (a.columns ? squares[0] : 0.0f) * a.inverse_columns;
    moments[row] = moments[row] * a.beta2 + mean * a.one_minus_beta2;
  }
}

}  // namespace
}  // namespace bitorch_engine
