// The step of a block of 128 elements, for any vector type. A file per instruction set brings its `Simd`, instantiates
// step_blocks with it, and nothing else: what is computed, and in which order it rounds, stands here alone.
//
//   Simd::F, Simd::I   vectors of `width` floats and of as many 32-bit integers
//   load, store, broadcast and arithmetic by their usual names; root is the square root, nearest rounds to even
//   load_bytes, load_halves: unsigned integers of 8 and 16 bits widened, load_signed_bytes: signed ones; from_half, to_half: float16 in the low 16 bits
//   max_size: of a, which is not negative, and the size of b
//   narrow_bytes, narrow_halves: 128 integers, clamped to 0 .. 255, and the low 16 bits of each
//   narrow_signed: sign (bit 12) and x - base, 0 .. 127, of 128 integers, as bytes
//   read_levels, write_levels: 128 levels from and to the two planes
#pragma once

#include <cstring>

#include "update/update.h"

namespace bitorch_engine {
namespace {

template <class S>
static inline typename S::I hash(typename S::I x) {  // reference/noise.py
  x = S::mul(S::xor_(x, S::template right<16>(x)), S::ints(0x7FEB352D));
  x = S::mul(S::xor_(x, S::template right<15>(x)), S::ints(static_cast<int32_t>(0x846CA68Bu)));
  return S::xor_(x, S::template right<16>(x));
}

static inline uint32_t hash_word(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// `cut` bits of noise: the upper ones for a second moment, the lower ones for a first.
template <class S, int cut, bool is_signed>
static inline typename S::I noise_below(typename S::I noise) {
  if constexpr (is_signed) return S::and_(noise, S::ints((1 << cut) - 1));
  return S::template right<32 - cut>(noise);
}

// A block on its way through a moment: apart from what is in registers, which an array beside it would keep from there.
struct alignas(64) Held {
  float values[BLOCK];
  int32_t codes[BLOCK];
  uint8_t* at;
  int32_t unit;
};

// A block of a moment: what holds for all of it is read at the start; load(i) and put(i, value, noise) take and give a
// vector; settle() comes when all are put; encode(held, noises) writes what had to wait until then. It is called a block
// later, when what settle found out has long arrived.
template <class S, MomentKind kind, bool is_signed>
struct Moment;

template <class S, bool is_signed>
struct Moment<S, NONE, is_signed> {
  Moment(void*, Held*) {}
  void settle() {}
  static void encode(Held&, const int32_t*) {}
};

template <class S, bool is_signed>
struct Moment<S, MOMENT_F32, is_signed> {
  float* at;
  Moment(void* block, Held*) : at(static_cast<float*>(block)) {}
  typename S::F load(int i) const { return S::load(at + i); }
  void put(int i, typename S::F value, typename S::I) { S::store(at + i, value); }
  void settle() {}
  static void encode(Held&, const int32_t*) {}
};

template <class S, bool is_signed>
struct Moment<S, MOMENT_BF16, is_signed> {
  uint16_t* at;
  int32_t* cut;
  Moment(void* block, Held* held) : at(static_cast<uint16_t*>(block)), cut(held->codes) {}
  typename S::F load(int i) const { return S::as_float(S::template left<16>(S::load_halves(at + i))); }
  void put(int i, typename S::F value, typename S::I noise) {
    const auto rounded = S::add(S::as_int(value), noise_below<S, 16, is_signed>(noise));
    S::store_int(cut + i, S::template right<16>(rounded));
  }
  void settle() { S::narrow_halves(cut, at); }
  static void encode(Held&, const int32_t*) {}
};

template <class S, bool is_signed>
struct Moment<S, MOMENT_F16, is_signed> {
  uint16_t* at;
  int32_t* cut;
  Moment(void* block, Held* held) : at(static_cast<uint16_t*>(block)), cut(held->codes) {}
  typename S::F load(int i) const { return S::from_half(S::load_halves(at + i)); }
  void put(int i, typename S::F value, typename S::I noise) {
    const auto sign = S::and_(S::as_int(value), S::ints(INT32_MIN));
    const auto size = S::as_float(S::xor_(S::as_int(value), sign));
    // Below 2**-14, float16 is even: adding 2**-14 makes the cut bits those below its last one.
    const auto shift = S::where_less(size, S::floats(0x1p-14f), S::floats(0x1p-14f));
    const auto rounded = S::add(S::as_int(S::add(size, shift)), noise_below<S, 13, is_signed>(noise));
    const auto even = S::as_float(S::and_(rounded, S::ints(~0x1FFF)));
    const auto stored = S::min(S::sub(even, shift), S::floats(65504.0f));
    S::store_int(cut + i, S::to_half(S::as_float(S::or_(S::as_int(stored), sign))));
  }
  void settle() { S::narrow_halves(cut, at); }
  static void encode(Held&, const int32_t*) {}
};

// x + unit, as float32, less the unit, cut after 4 bits of fraction; reference/moments.py.
template <class S, bool is_signed>
struct Moment<S, MOMENT_8BIT, is_signed> {
  static constexpr int cut_bits = 19, doublings = is_signed ? 8 : 16;
  uint8_t* at;
  typename S::F unit, largest;
  typename S::I unit_bits;
  Held* held;
  Moment(void* block, Held* held) : at(static_cast<uint8_t*>(block)), held(held) {
    float value;
    std::memcpy(&value, at + BLOCK, sizeof value);
    unit = S::floats(value);
    unit_bits = S::as_int(unit);
    largest = S::floats(0);
  }
  typename S::F load(int i) const {
    const auto code = is_signed ? S::load_signed_bytes(at + i) : S::load_bytes(at + i);
    const auto size = S::template left<cut_bits>(code);
    if constexpr (!is_signed) return S::sub(S::as_float(S::add(size, unit_bits)), unit);
    const auto value = S::sub(S::as_float(S::add(S::and_(size, S::ints(0x7F << cut_bits)), unit_bits)), unit);
    return S::as_float(S::xor_(S::as_int(value), S::and_(code, S::ints(INT32_MIN))));
  }
  void put(int i, typename S::F value, typename S::I) {
    S::store(held->values + i, value);
    largest = is_signed ? S::max_size(largest, value) : S::max(largest, value);
  }
  void settle() {
    const float top = S::largest(largest);
    int32_t bits;
    std::memcpy(&bits, &top, sizeof bits);
    const int room = (1 << (24 - doublings)) + (1 << cut_bits) - 1;
    int exponent = ((bits + room) >> 23) - (doublings - 1);
    if (exponent < 1) exponent = 1;
    held->at = at;
    held->unit = exponent << 23;
    std::memcpy(at + BLOCK, &held->unit, sizeof held->unit);
  }
  static void encode(Held& held, const int32_t* noises) {
    const auto base = S::ints(held.unit);
    for (int i = 0; i < BLOCK; i += S::width) {
      const auto value = S::load(held.values + i);
      const auto noise = noise_below<S, cut_bits, is_signed>(S::load_int(noises + i));
      if constexpr (is_signed) {
        const auto sign = S::and_(S::as_int(value), S::ints(INT32_MIN));
        const auto sum = S::add(value, S::as_float(S::or_(sign, base)));
        S::store_int(held.codes + i, S::template right<cut_bits>(S::add(S::as_int(sum), noise)));
      } else {
        const auto sum = S::as_int(S::add(value, S::as_float(base)));
        const auto code = S::template right<cut_bits>(S::sub(S::add(sum, noise), base));
        // What is positive stays positive.
        S::store_int(held.codes + i, S::max(code, S::min(S::as_int(value), S::ints(1))));
      }
    }
    if constexpr (is_signed) {
      S::narrow_signed(held.codes, held.unit >> cut_bits, held.at);
    } else {
      S::narrow_bytes(held.codes, held.at);
    }
  }
};

// Asks for what is needed a few blocks on, a share of it with each step through a block: the processor's own guesses do
// not cover five streams.
template <class S, MomentKind first_kind, MomentKind second_kind>
static inline void prefetch(const StepRule& rule, const Blocks& blocks, int64_t block, int i) {
  constexpr int64_t ahead = 16;
  if (i % 16 != 0) return;
  const auto line = [=](const void* base, int64_t bytes) {  // of a block; four calls for half of it each cover it
    const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>((block + ahead) * bytes);
    for (int64_t byte = 0; byte * 4 < bytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(at + i / 16 * (bytes / 4) + byte));
    }
  };
  line(blocks.grad, rule.grad_bf16 ? 2 * BLOCK : 4 * BLOCK);
  if constexpr (first_kind != NONE) line(blocks.first, moment_bytes(first_kind));
  if constexpr (second_kind != NONE) line(blocks.second, moment_bytes(second_kind));
}

template <class S, MomentKind first_kind, MomentKind second_kind>
static void step_blocks(const StepRule& rule, const Blocks& blocks) {
  using F = typename S::F;
  using I = typename S::I;
  const auto planes = S::planes(rule.bits);
  alignas(64) uint8_t levels[BLOCK];
  alignas(64) int32_t moved[BLOCK], noises[2][BLOCK];
  alignas(64) float wide[BLOCK];
  Held first_held[2], second_held[2];  // of this block, and of the one before
  using First = Moment<S, first_kind, true>;
  using Second = Moment<S, second_kind, false>;
  const F beta1 = S::floats(rule.beta1), rest1 = S::floats(rule.rest1);
  const F beta2 = S::floats(rule.beta2), rest2 = S::floats(rule.rest2), least = S::floats(rule.least);
  const bool as_is = !rule.grad_bf16 && rule.grad_factor == 1;
  const float* rate = blocks.rate;
  for (int64_t block = 0; block < blocks.count; ++block, rate += blocks.rate_stride) {
    const int64_t start = blocks.start + block * BLOCK;
    const float* grad = static_cast<const float*>(blocks.grad) + block * BLOCK;
    if (!as_is) {
      const F factor = S::floats(rule.grad_factor);
      const auto halves = static_cast<const uint16_t*>(blocks.grad) + block * BLOCK;
      for (int i = 0; i < BLOCK; i += S::width) {
        const F value = rule.grad_bf16 ? S::as_float(S::template left<16>(S::load_halves(halves + i)))
                                       : S::load(grad + i);
        S::store(wide + i, S::mul(value, factor));
      }
      grad = wide;
    }
    uint8_t* packed = blocks.packed + block * (BLOCK / 8) * rule.bits;
    uint8_t* residual = blocks.residual + block * (BLOCK / 8) * (8 - rule.bits);
    S::read_levels(planes, packed, residual, levels);
    const int now = block & 1, before = 1 - now;
    First first(static_cast<uint8_t*>(blocks.first) + block * moment_bytes(first_kind), &first_held[now]);
    Second second(static_cast<uint8_t*>(blocks.second) + block * moment_bytes(second_kind), &second_held[now]);
    const uint32_t above = static_cast<uint32_t>(start >> 32);
    const I key = S::ints(static_cast<int32_t>(rule.key ^ (above ? hash_word(above) : 0)));
    I index = S::add(S::ints(static_cast<int32_t>(start)), S::lanes());
    const auto step = [&](int i, I noise) __attribute__((always_inline)) {
      if constexpr (first_kind == MOMENT_8BIT || second_kind == MOMENT_8BIT) S::store_int(noises[now] + i, noise);
      const F g = S::load(grad + i);
      F move = g;
      if constexpr (first_kind != NONE) {
        move = S::add(S::mul(first.load(i), beta1), S::mul(g, rest1));
        first.put(i, move, noise);
      }
      move = S::mul(move, S::load(rate + i));
      if constexpr (second_kind != NONE) {
        const F v = S::add(S::mul(second.load(i), beta2), S::mul(S::mul(g, g), rest2));
        second.put(i, v, noise);
        move = S::div(move, S::add(S::root(v), least));
      }
      // 255 levels at most, so that the noise fits on top; below the least int32, nearest gives that: 256 levels down.
      const I fine = S::nearest(S::min(move, S::floats(255 * 0x1p23f)));
      const I steps = S::template right_signed<23>(S::add(fine, S::template right<9>(noise)));
      S::store_int(moved + i, S::add(S::load_bytes(levels + i), steps));
    };
    for (int i = 0; i < BLOCK / 2; i += S::width) {
      prefetch<S, first_kind, second_kind>(rule, blocks, block, i);
      const I noise = hash<S>(S::xor_(index, key));
      index = S::add(index, S::ints(S::width));
      step(i, noise);
      step(i + BLOCK / 2, S::mul(noise, S::ints(static_cast<int32_t>(0xAD166959u))));
    }
    first.settle();
    second.settle();
    if (block > 0) {
      First::encode(first_held[before], noises[before]);
      Second::encode(second_held[before], noises[before]);
    }
    S::narrow_bytes(moved, levels);
    S::write_levels(planes, levels, packed, residual);
  }
  const int last = (blocks.count - 1) & 1;
  First::encode(first_held[last], noises[last]);
  Second::encode(second_held[last], noises[last]);
}

template <class S, MomentKind first>
static void step_blocks_with(const StepRule& rule, const Blocks& blocks) {
  switch (rule.second) {
    case MOMENT_F32: return step_blocks<S, first, MOMENT_F32>(rule, blocks);
    case MOMENT_BF16: return step_blocks<S, first, MOMENT_BF16>(rule, blocks);
    case MOMENT_F16: return step_blocks<S, first, MOMENT_F16>(rule, blocks);
    case MOMENT_8BIT: return step_blocks<S, first, MOMENT_8BIT>(rule, blocks);
    default: return step_blocks<S, first, NONE>(rule, blocks);
  }
}

template <class S>
static void step_any_blocks(const StepRule& rule, const Blocks& blocks) {
  switch (rule.first) {
    case MOMENT_F32: return step_blocks_with<S, MOMENT_F32>(rule, blocks);
    case MOMENT_BF16: return step_blocks_with<S, MOMENT_BF16>(rule, blocks);
    case MOMENT_F16: return step_blocks_with<S, MOMENT_F16>(rule, blocks);
    case MOMENT_8BIT: return step_blocks_with<S, MOMENT_8BIT>(rule, blocks);
    default: return step_blocks_with<S, NONE>(rule, blocks);
  }
}

// Compiled, and vectorized, for the instruction set of the file that includes this: the order of additions is fixed.
static inline float mean_square_here(const void* grad, int bf16, float factor, int64_t count, float* scratch) {
  int64_t half = 1;
  while (2 * half < count) half *= 2;
  const auto square = [=](int64_t i) {
    float value;
    if (bf16) {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(grad)[i]} << 16;
      std::memcpy(&value, &bits, sizeof value);
    } else {
      value = static_cast<const float*>(grad)[i];
    }
    value *= factor;
    return value * value;
  };
  const int64_t both = count - half;  // elements of the upper half
  if (bf16) {
    for (int64_t i = 0; i < both; ++i) scratch[i] = square(i) + square(half + i);
    for (int64_t i = both; i < half; ++i) scratch[i] = square(i);
  } else {
    const float* values = static_cast<const float*>(grad);
    for (int64_t i = 0; i < both; ++i) {
      const float low = values[i] * factor, high = values[half + i] * factor;
      scratch[i] = low * low + high * high;
    }
    for (int64_t i = both; i < half; ++i) scratch[i] = square(i);
  }
  for (half /= 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) scratch[i] += scratch[half + i];
  }
  return scratch[0] * static_cast<float>(1.0 / static_cast<double>(count));
}

// Sizes of floats are in the order of their bits, NaN above all. Four runs at a time: a processor fetches several streams
// faster than one.
template <class S>
static inline bool within_here(const float* values, int64_t count, float limit) {
  constexpr int runs = 4, step = 2 * S::width;
  const auto bits = [=](int64_t i) { return S::and_(S::as_int(S::load(values + i)), S::ints(INT32_MAX)); };
  const int64_t run = count / (runs * step) * step;
  typename S::I largest[runs];
#pragma GCC unroll 4
  for (int r = 0; r < runs; ++r) largest[r] = S::ints(0);
  for (int64_t i = 0; i < run; i += step) {
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r) {
      largest[r] = S::max(largest[r], S::max(bits(r * run + i), bits(r * run + i + S::width)));
    }
  }
  int32_t bound, size, lanes[S::width];
  std::memcpy(&bound, &limit, sizeof bound);
  bool within = true;
  S::store_int(lanes, S::max(S::max(largest[0], largest[1]), S::max(largest[2], largest[3])));
  for (int lane = 0; lane < S::width; ++lane) within &= lanes[lane] < bound;
  for (int64_t i = runs * run; i < count; ++i) {
    std::memcpy(&size, values + i, sizeof size);
    within &= (size & INT32_MAX) < bound;
  }
  return within;
}

}  // namespace
}  // namespace bitorch_engine
