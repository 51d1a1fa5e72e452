// The step of a block of 128 elements, for any vector type. A file per instruction set brings its `Simd`, instantiates
// step_blocks with it, and nothing else: what is computed, and in which order it rounds, stands here alone.
//
//   Simd::F, Simd::I   vectors of `width` floats and of as many 32-bit integers
//   load, store, broadcast and arithmetic by their usual names; root is the square root, nearest rounds to even
//   max_size: of a, which is not negative, and the size of b
//   with_sign: x, whose upper bit is not set, with the one of y
//
// What lies in memory comes in fours of vectors, in an order that is the Simd's own: that of unpacking and packing
// within 128 bits, where this is cheaper than the order of the elements.
//
//   lanes4             the place of each element among the 4 * width
//   load4, store4      floats
//   load_tops4, store_tops4      16 bits each, from and to the upper half of an integer
//   load_halves4, store_halves4  float16
//   load_codes4<cut, is_signed>  8 bits each, times 2**cut, of which the uppermost is a sign, bit 31, if is_signed
//   store_signed4      sign (bit 12) and x - base, 0 .. 127, as bytes
//   store_positive4    x - base, 0 .. 255, as bytes, but 1 at least where the integer of the value is above 0
//   move_levels4       bytes plus 9-bit integers, clamped to 0 .. 255
//   read_levels, write_levels: 128 levels from and to the two planes
#pragma once

#include <cstring>

#include "update/update.h"

#define ALWAYS_INLINE __attribute__((always_inline))

namespace bitorch_engine {
namespace {

constexpr uint32_t HASH_FIRST = 0x7FEB352D, HASH_SECOND = 0x846CA68B;  // reference/noise.py

static inline uint32_t hash_word(uint32_t x) {
  x = (x ^ x >> 16) * HASH_FIRST;
  x = (x ^ x >> 15) * HASH_SECOND;
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
  uint8_t* at;
  int32_t unit;
};

// A block of a moment: what holds for all of it is read at the start; load4(i, values) and put4(i, values, noise) take
// and give four vectors; settle() comes when all are put; encode(held, noises) writes what had to wait until then. It
// is called a block later, when what settle found out has long arrived.
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
  void load4(int i, typename S::F* values) const { S::load4(at + i, values); }
  void put4(int i, const typename S::F* values, const typename S::I*) { S::store4(at + i, values); }
  void settle() {}
  static void encode(Held&, const int32_t*) {}
};

template <class S, bool is_signed>
struct Moment<S, MOMENT_BF16, is_signed> {
  uint16_t* at;
  Moment(void* block, Held*) : at(static_cast<uint16_t*>(block)) {}
  void load4(int i, typename S::F* values) const {
    typename S::I bits[4];
    S::load_tops4(at + i, bits);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) values[k] = S::as_float(bits[k]);
  }
  void put4(int i, const typename S::F* values, const typename S::I* noise) {
    typename S::I bits[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) bits[k] = S::add(S::as_int(values[k]), noise_below<S, 16, is_signed>(noise[k]));
    S::store_tops4(at + i, bits);
  }
  void settle() {}
  static void encode(Held&, const int32_t*) {}
};

template <class S, bool is_signed>
struct Moment<S, MOMENT_F16, is_signed> {
  uint16_t* at;
  Moment(void* block, Held*) : at(static_cast<uint16_t*>(block)) {}
  void load4(int i, typename S::F* values) const { S::load_halves4(at + i, values); }
  void put4(int i, const typename S::F* values, const typename S::I* noise) {
    typename S::F stored[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const auto sign = S::and_(S::as_int(values[k]), S::ints(INT32_MIN));
      const auto size = S::as_float(S::xor_(S::as_int(values[k]), sign));
      // Below 2**-14, float16 is even: adding 2**-14 makes the cut bits those below its last one.
      const auto shift = S::where_less(size, S::floats(0x1p-14f), S::floats(0x1p-14f));
      const auto rounded = S::add(S::as_int(S::add(size, shift)), noise_below<S, 13, is_signed>(noise[k]));
      const auto even = S::as_float(S::and_(rounded, S::ints(~0x1FFF)));
      const auto most = S::min(S::sub(even, shift), S::floats(65504.0f));
      stored[k] = S::as_float(S::or_(S::as_int(most), sign));
    }
    S::store_halves4(at + i, stored);
  }
  void settle() {}
  static void encode(Held&, const int32_t*) {}
};

// x + unit, as float32, less the unit, cut after 4 bits of fraction; reference/moments.py.
template <class S, bool is_signed>
struct Moment<S, MOMENT_8BIT, is_signed> {
  static constexpr int cut_bits = 19, doublings = is_signed ? 8 : 16;
  uint8_t* at;
  typename S::F unit, largest;
  Held* held;
  Moment(void* block, Held* held) : at(static_cast<uint8_t*>(block)), held(held) {
    float value;
    std::memcpy(&value, at + BLOCK, sizeof value);
    unit = S::floats(value);
    largest = S::floats(0);
  }
  void load4(int i, typename S::F* values) const {
    typename S::I codes[4];
    S::template load_codes4<cut_bits, is_signed>(at + i, codes);
    const auto unit_bits = S::as_int(unit);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if constexpr (is_signed) {
        const auto base = S::with_sign(unit_bits, codes[k]);
        values[k] = S::sub(S::as_float(S::add(codes[k], unit_bits)), S::as_float(base));
      } else {
        values[k] = S::sub(S::as_float(S::add(codes[k], unit_bits)), unit);
      }
    }
  }
  void put4(int i, const typename S::F* values, const typename S::I*) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      S::store(held->values + i + k * S::width, values[k]);
      largest = is_signed ? S::max_size(largest, values[k]) : S::max(largest, values[k]);
    }
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
    typename S::I values[4], sums[4];
    for (int i = 0; i < BLOCK; i += 4 * S::width) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const auto value = S::load(held.values + i + k * S::width);
        const auto noise = noise_below<S, cut_bits, is_signed>(S::load_int(noises + i + k * S::width));
        values[k] = S::as_int(value);
        const auto unit = is_signed ? S::with_sign(base, values[k]) : base;
        const auto sum = S::add(value, S::as_float(unit));
        sums[k] = S::template right<cut_bits>(S::add(S::as_int(sum), noise));
      }
      if constexpr (is_signed) {
        S::store_signed4(held.at + i, held.unit >> cut_bits, sums);
      } else {
        S::store_positive4(held.at + i, held.unit >> cut_bits, sums, values);
      }
    }
  }
};

static inline uint32_t key_at(uint32_t key, int64_t start) {
  const uint32_t above = static_cast<uint32_t>(start >> 32);
  return above ? key ^ hash_word(above) : key;
}

// Noise of the first half of a block, in fours; the second half has a multiple of it. Places in the half are below 64,
// so that the hash of place ^ x begins with place ^ y, y = x ^ x >> 16, times a factor: the product of y's upper bits,
// plus that of its lowest six and the place, which few blocks find changed.
template <class S>
class Noise {
 public:
  Noise() { S::lanes4(lanes_); }

  ALWAYS_INLINE void begin_block(uint32_t key, int64_t start) {
    const uint32_t x = key_at(key, start) ^ static_cast<uint32_t>(start), y = x ^ x >> 16;
    if ((y & PLACES) != low_) lay_out(y & PLACES);
    upper_ = S::ints(static_cast<int32_t>((y & ~PLACES) * HASH_FIRST));
  }

  ALWAYS_INLINE void load4(int i, typename S::I* out) const {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      auto x = S::add(S::load_int(products_ + i + k * S::width), upper_);
      x = S::mul(S::xor_(x, S::template right<15>(x)), S::ints(static_cast<int32_t>(HASH_SECOND)));
      out[k] = S::xor_(x, S::template right<16>(x));
    }
  }

 private:
  static constexpr uint32_t PLACES = BLOCK / 2 - 1;
  alignas(64) int32_t products_[BLOCK / 2];
  typename S::I lanes_[4], upper_;
  uint32_t low_ = ~0u;

  void lay_out(uint32_t low) {
    low_ = low;
    for (int i = 0; i < BLOCK / 2; i += 4 * S::width) {
      const auto start = S::ints(static_cast<int32_t>(low ^ static_cast<uint32_t>(i)));
      for (int k = 0; k < 4; ++k) {
        const auto product = S::mul(S::xor_(lanes_[k], start), S::ints(static_cast<int32_t>(HASH_FIRST)));
        S::store_int(products_ + i + k * S::width, product);
      }
    }
  }
};

template <class S>
static inline typename S::I noise_of_second_half(typename S::I noise) {
  return S::mul(noise, S::ints(static_cast<int32_t>(0xAD166959u)));
}

// Levels at `p` by four vectors of moves, in units of 2**-23 levels.
template <class S>
ALWAYS_INLINE static inline void move4(uint8_t* p, const typename S::F* move, const typename S::I* noise) {
  typename S::I steps[4];
  // 255 levels at most, so that the noise fits on top; below the least int32, nearest gives that: 256 levels down.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto fine = S::nearest(S::min(move[k], S::floats(255 * 0x1p23f)));
    steps[k] = S::template right_signed<23>(S::add(fine, S::template right<9>(noise[k])));
  }
  S::move_levels4(p, steps);
}

// The rates of a block, in the order of a four, where they are not those of the block before.
template <class S>
ALWAYS_INLINE static inline void lay_out_rates(const Blocks& blocks, int64_t block, float* rates) {
  if (block > 0 && blocks.rate_stride == 0) return;
  for (int i = 0; i < BLOCK; i += 4 * S::width) {
    typename S::F rate[4];
    S::load4(blocks.rate + block * blocks.rate_stride + i, rate);
    for (int k = 0; k < 4; ++k) S::store(rates + i + k * S::width, rate[k]);
  }
}

// The gradient of a block, times the factor: where it lies, or in `wide`.
template <class S>
ALWAYS_INLINE static inline const float* float_grad(const StepRule& rule, const Blocks& blocks, int64_t block,
                                                    float* wide) {
  const float* grad = static_cast<const float*>(blocks.grad) + block * BLOCK;
  if (!rule.grad_bf16 && rule.grad_factor == 1) return grad;
  const auto factor = S::floats(rule.grad_factor);
  const auto halves = static_cast<const uint16_t*>(blocks.grad) + block * BLOCK;
  for (int i = 0; i < BLOCK; i += 4 * S::width) {
    typename S::F values[4];
    typename S::I bits[4];
    if (rule.grad_bf16) {
      S::load_tops4(halves + i, bits);
      for (int k = 0; k < 4; ++k) values[k] = S::as_float(bits[k]);
    } else {
      S::load4(grad + i, values);
    }
    for (int k = 0; k < 4; ++k) values[k] = S::mul(values[k], factor);
    S::store4(wide + i, values);
  }
  return wide;
}

static inline uint8_t* packed_at(const StepRule& rule, const Blocks& blocks, int64_t block) {
  return blocks.packed + block * (BLOCK / 8) * rule.bits;
}

static inline uint8_t* residual_at(const StepRule& rule, const Blocks& blocks, int64_t block) {
  return blocks.residual + block * (BLOCK / 8) * (8 - rule.bits);
}

// Inlined, always: GCC takes a function that does nothing else for one without effect, and leaves it out.
ALWAYS_INLINE static inline void ask_for_grad(const StepRule& rule, const Blocks& blocks, int64_t block) {
  const int64_t bytes = BLOCK * (rule.grad_bf16 ? 2 : 4);
  const uintptr_t at = reinterpret_cast<uintptr_t>(blocks.grad) + static_cast<uintptr_t>(block * bytes);
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + line));
}

// Without moments, memory is what takes time: the gradient times the rate is the move.
template <class S>
static void move_blocks(const StepRule& rule, const Blocks& blocks) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int four = 4 * S::width, half = BLOCK / 2;
  const auto planes = S::planes(rule.bits);
  alignas(64) uint8_t levels[BLOCK];
  alignas(64) float wide[BLOCK], rates[BLOCK];
  Noise<S> half_noise;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t start = blocks.start + block * BLOCK;
    ask_for_grad(rule, blocks, block + 16);
    lay_out_rates<S>(blocks, block, rates);
    const float* grad = float_grad<S>(rule, blocks, block, wide);
    uint8_t* packed = packed_at(rule, blocks, block);
    uint8_t* residual = residual_at(rule, blocks, block);
    S::read_levels(planes, packed, residual, levels);
    half_noise.begin_block(rule.key, start);
    for (int i = 0; i < half; i += four) {
      I noise[4];
      half_noise.load4(i, noise);
      for (int at = i; at < BLOCK; at += half) {
        F move[4];
        S::load4(grad + at, move);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          if (at >= half) noise[k] = noise_of_second_half<S>(noise[k]);
          move[k] = S::mul(move[k], S::load(rates + at + k * S::width));
        }
        move4<S>(levels + at, move, noise);
      }
    }
    S::write_levels(planes, levels, packed, residual);
  }
}

// What a block passes on to its second stage.
struct alignas(64) Passing {
  int32_t noise[BLOCK];
  float move[BLOCK];  // in units of 2**-23 levels, times the root of the second moment where there is one
  float root[BLOCK];
  Held first, second;
};

template <class S>
ALWAYS_INLINE static inline void make_noise(Noise<S>& half_noise, uint32_t key, int64_t start, Passing& to) {
  half_noise.begin_block(key, start);
  for (int i = 0; i < BLOCK / 2; i += 4 * S::width) {
    typename S::I noise[4];
    half_noise.load4(i, noise);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      S::store_int(to.noise + i + k * S::width, noise[k]);
      S::store_int(to.noise + BLOCK / 2 + i + k * S::width, noise_of_second_half<S>(noise[k]));
    }
  }
}

// Hashes, roots and quotients take their time. The noise of a block is made a block before it is used, and levels and
// codes are written a block after what they wait for was begun, so that nothing stands in the queue of the processor
// meanwhile. Roots are taken in one stage and quotients in the next, as both have one slow unit between them.
template <class S, MomentKind first_kind, MomentKind second_kind>
static void step_blocks(const StepRule& rule, const Blocks& blocks) {
  if constexpr (first_kind == NONE && second_kind == NONE) return move_blocks<S>(rule, blocks);
  using F = typename S::F;
  using I = typename S::I;
  using First = Moment<S, first_kind, true>;
  using Second = Moment<S, second_kind, false>;
  constexpr int four = 4 * S::width;
  const auto planes = S::planes(rule.bits);
  alignas(64) uint8_t levels[BLOCK];
  alignas(64) float wide[BLOCK], rates[BLOCK];
  Passing passing[3];
  const F beta1 = S::floats(rule.beta1), rest1 = S::floats(rule.rest1);
  const F beta2 = S::floats(rule.beta2), rest2 = S::floats(rule.rest2), least = S::floats(rule.least);
  Noise<S> half_noise;

  const auto finish = [&](int64_t block, Passing& from) __attribute__((always_inline)) {
    uint8_t* packed = packed_at(rule, blocks, block);
    uint8_t* residual = residual_at(rule, blocks, block);
    S::read_levels(planes, packed, residual, levels);
    for (int i = 0; i < BLOCK; i += four) {
      F move[4];
      I noise[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        move[k] = S::load(from.move + i + k * S::width);
        if constexpr (second_kind != NONE) {
          move[k] = S::div(move[k], S::add(S::load(from.root + i + k * S::width), least));
        }
        noise[k] = S::load_int(from.noise + i + k * S::width);
      }
      move4<S>(levels + i, move, noise);
    }
    S::write_levels(planes, levels, packed, residual);
    First::encode(from.first, from.noise);
    Second::encode(from.second, from.noise);
  };

  Passing *before = passing, *now = passing + 1, *next = passing + 2;
  make_noise<S>(half_noise, rule.key, blocks.start, *now);
  for (int64_t block = 0; block < blocks.count; ++block) {
    lay_out_rates<S>(blocks, block, rates);
    const float* grad = float_grad<S>(rule, blocks, block, wide);
    First first(static_cast<uint8_t*>(blocks.first) + block * moment_bytes(first_kind), &now->first);
    Second second(static_cast<uint8_t*>(blocks.second) + block * moment_bytes(second_kind), &now->second);
    for (int i = 0; i < BLOCK; i += four) {
      F g[4], move[4];
      I noise[4];
      S::load4(grad + i, g);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) noise[k] = S::load_int(now->noise + i + k * S::width);
      if constexpr (first_kind != NONE) {
        first.load4(i, move);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) move[k] = S::add(S::mul(move[k], beta1), S::mul(g[k], rest1));
        first.put4(i, move, noise);
      } else {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) move[k] = g[k];
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) move[k] = S::mul(move[k], S::load(rates + i + k * S::width));
      if constexpr (second_kind != NONE) {
        F v[4];
        second.load4(i, v);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) v[k] = S::add(S::mul(v[k], beta2), S::mul(S::mul(g[k], g[k]), rest2));
        second.put4(i, v, noise);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) S::store(now->root + i + k * S::width, S::root(v[k]));
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) S::store(now->move + i + k * S::width, move[k]);
    }
    first.settle();
    second.settle();
    if (block + 1 < blocks.count) make_noise<S>(half_noise, rule.key, blocks.start + (block + 1) * BLOCK, *next);
    if (block > 0) finish(block - 1, *before);
    Passing* free = before;
    before = now;
    now = next;
    next = free;
  }
  finish(blocks.count - 1, *before);
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

// Squares, then halves added until one is left: three rounds at a time, where vectors fill the eight parts that meet.
// Meanwhile a quarter of each of four rows, `ahead` and `stride` bytes apart, is asked for.
template <class S>
static inline float mean_square_here(const void* grad, int bf16, float factor, int64_t count, float* scratch,
                                     const void* ahead, int64_t stride) {
  const float* values = static_cast<const float*>(grad);
  const auto value = [=](int64_t i) {
    if (!bf16) return values[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(grad)[i]} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  };
  int64_t length = 1;
  while (length < count) length *= 2;

  const float* parts[8];
  const auto add_parts = [&](int64_t i, const auto& of) __attribute__((always_inline)) {
    const auto pair = [&](int k) __attribute__((always_inline)) {
      return S::add(of(S::load(parts[k] + i)), of(S::load(parts[k + 4] + i)));
    };
    S::store(scratch + i, S::add(S::add(pair(0), pair(2)), S::add(pair(1), pair(3))));
  };
  if (length >= 8 * S::width) {
    length /= 8;
    for (int k = 0; k < 8; ++k) {
      const int64_t start = k * length, left = count - start;
      const int64_t there = left < 0 ? 0 : left < length ? left : length;
      parts[k] = values + start;
      if (bf16 || there < length) {
        for (int64_t i = start; i < start + there; ++i) scratch[i] = value(i);
        std::memset(scratch + start + there, 0, static_cast<size_t>(length - there) * sizeof(float));
        parts[k] = scratch + start;
      }
    }
    const auto factors = S::floats(factor);
    const auto square = [=](typename S::F x) __attribute__((always_inline)) {
      x = S::mul(x, factors);
      return S::mul(x, x);
    };
    for (int64_t i = 0; i < length; i += S::width) {
      for (int64_t at = 8 * i; at < 8 * (i + S::width); at += 64) {
        for (int k = 0; k < 4; ++k) {
          const auto line = reinterpret_cast<uintptr_t>(ahead) + static_cast<uintptr_t>(k * stride + at);
          __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        }
      }
      add_parts(i, square);
    }
    while (length >= 8 * S::width) {
      length /= 8;
      for (int k = 0; k < 8; ++k) parts[k] = scratch + k * length;
      for (int64_t i = 0; i < length; i += S::width) add_parts(i, [](typename S::F x) { return x; });
    }
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = value(i) * factor * (value(i) * factor);
    std::memset(scratch + count, 0, static_cast<size_t>(length - count) * sizeof(float));
  }
  for (length /= 2; length > 0; length /= 2) {
    for (int64_t i = 0; i < length; ++i) scratch[i] += scratch[length + i];
  }
  return scratch[0] * static_cast<float>(1.0 / static_cast<double>(count));
}

// Sizes of floats are in the order of their bits, NaN above all. Four runs at a time: a processor fetches several
// streams faster than one.
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
