// The step of body.h with everything of 128 elements in registers: where moments are stored in float32, bfloat16 or
// 8 bits. What is left over, and float16, goes through body.h.
#include <immintrin.h>

#include "update/body.h"

namespace bitorch_engine {
namespace {

__m512i hash(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)),
                         _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

__m512 as_floats(__m512i x) { return _mm512_castsi512_ps(x); }
__m512i as_bits(__m512 x) { return _mm512_castps_si512(x); }
__m512i spread(int x) { return _mm512_set1_epi32(x); }

// Sixteen elements of a stored moment. codes: of the element's block, where it has 8 bits.
template <int kind, bool is_signed>
__m512 load(const void* stored, int64_t i, const uint8_t* codes, __m512 unit) {
  using C = Companding<is_signed>;
  if (kind == MOMENT_FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(stored) + i);
  if (kind == MOMENT_BFLOAT16) {
    const void* halves = static_cast<const uint16_t*>(stored) + i;
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(halves))), 16));
  }
  const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i % BLOCK)));
  const __m512i size = is_signed ? _mm512_and_si512(code, spread(127)) : code;
  const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(size, spread(C::base)), 20);
  const __m512 value = _mm512_mul_ps(_mm512_sub_ps(as_floats(bits), _mm512_set1_ps(C::offset)), unit);
  if (!is_signed) return value;
  return as_floats(_mm512_xor_si512(as_bits(value), _mm512_slli_epi32(_mm512_and_si512(code, spread(128)), 24)));
}

// Stores what needs no unit; 8 bits follow when the whole block is known.
template <int kind, bool is_signed>
void store(void* stored, int64_t i, __m512 value, __m512i noise) {
  if (kind == MOMENT_FLOAT32) _mm512_storeu_ps(static_cast<float*>(stored) + i, value);
  if (kind == MOMENT_BFLOAT16) {
    const __m512i random = is_signed ? _mm512_and_si512(noise, spread(0xffff)) : _mm512_srli_epi32(noise, 16);
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(as_bits(value), random), 16));
    void* place = static_cast<uint16_t*>(stored) + i;
    _mm256_storeu_si256(static_cast<__m256i*>(place), halves);
  }
}

template <bool is_signed>
void store_block(uint8_t* codes, const float* values, const uint32_t* noise, __m512i largest) {
  using C = Companding<is_signed>;
  uint32_t exponent = (static_cast<uint32_t>(_mm512_reduce_max_epu32(largest)) >> 23) + 1;
  exponent = exponent < 2 ? 2 : exponent > 252 ? 252 : exponent;
  const float unit = float_of(exponent << 23);
  const __m512 inverse = _mm512_set1_ps(float_of((254 - exponent) << 23));
#pragma GCC unroll 8
  for (int j = 0; j < BLOCK; j += 16) {
    const __m512 value = _mm512_load_ps(values + j);
    const __m512i bits = _mm512_load_si512(noise + j);
    const __m512i random = is_signed ? _mm512_and_si512(bits, spread(0xfffff)) : _mm512_srli_epi32(bits, 12);
    const __m512 sum = _mm512_add_ps(_mm512_mul_ps(_mm512_abs_ps(value), inverse), _mm512_set1_ps(C::offset));
    __m512i code = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_add_epi32(as_bits(sum), random), 20), spread(C::base));
    if (is_signed)
      code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(as_bits(value), 24), spread(128)));
    else
      code = _mm512_mask_max_epu32(code, _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ), code, spread(1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), _mm512_cvtepi32_epi8(code));
  }
  __builtin_memcpy(codes + BLOCK, &unit, sizeof unit);
}

// 64 values of 1 to 8 bits between a packed plane and a vector of bytes.
class Plane {
 public:
  explicit Plane(int bits) : bits_(bits) {
    alignas(64) uint8_t lanes[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      lanes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
      shifts[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    lane_ = _mm512_load_si512(lanes);
    shift_ = _mm512_load_si512(shifts);
    present_ = bits == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bits) - 1;
    value_ = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    extract_ = ((uint64_t{1} << bits) - 1) * 0x0101010101010101u;
  }

  __m512i load(const uint8_t* packed) const {
    const __m512i bytes = _mm512_permutexvar_epi8(lane_, _mm512_maskz_loadu_epi8(present_, packed));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift_, bytes), value_);
  }

  void store(uint8_t* packed, __m512i values) const {
    if (bits_ == 4) {  // pairs of bytes: low + 16 * high
      const __m512i pairs = _mm512_maddubs_epi16(values, _mm512_set1_epi16(0x1001));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(pairs));
      return;
    }
    alignas(64) uint64_t eights[8], words[9];
    _mm512_store_si512(eights, values);
    uint8_t* to = reinterpret_cast<uint8_t*>(words);
    for (int i = 0; i < 8; ++i, to += bits_) {
      const uint64_t word = _pext_u64(eights[i], extract_);
      __builtin_memcpy(to, &word, 8);
    }
    _mm512_mask_storeu_epi8(packed, present_, _mm512_loadu_si512(words));
  }

 private:
  int bits_;
  __m512i lane_, shift_, value_;
  __mmask64 present_;
  uint64_t extract_;
};

__m512i shift_left(__m512i bytes, int by) {
  const __m512i kept = _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0xff >> by)));
  return _mm512_sll_epi16(kept, _mm_cvtsi32_si128(by));
}

__m512i shift_right(__m512i bytes, int by) {
  const __m512i moved = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(by));
  return _mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(0xff >> by)));
}

// Levels after a move, from levels before it, 16 of them.
__m128i moved(__m128i levels, __m512 move, __m512i noise) {
  const __m512 uniform = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(noise, 8)), _mm512_set1_ps(0x1p-24f));
  const __m512 size = _mm512_min_ps(_mm512_abs_ps(move), _mm512_set1_ps(256));
  const __m512 whole = _mm512_roundscale_ps(size, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask16 up = _mm512_cmp_ps_mask(uniform, _mm512_sub_ps(size, whole), _CMP_LT_OQ);
  const __m512i floor = _mm512_cvttps_epi32(whole);
  const __m512i steps = _mm512_mask_add_epi32(floor, up, floor, spread(1));
  const __m512i before = _mm512_cvtepu8_epi32(levels);
  const __mmask16 negative = _mm512_movepi32_mask(as_bits(move));
  const __m512i after = _mm512_mask_sub_epi32(_mm512_add_epi32(before, steps), negative, before, steps);
  return _mm512_cvtusepi32_epi8(_mm512_max_epi32(after, _mm512_setzero_si512()));
}

template <int first_kind, int second_kind>
void update_blocks(const UpdateArguments& a, const float* rates, int64_t first, int64_t last) {
  constexpr bool noisy = (first_kind >= MOMENT_BFLOAT16 && first_kind <= MOMENT_8BIT) ||
                         (second_kind >= MOMENT_BFLOAT16 && second_kind <= MOMENT_8BIT);
  const int bits = static_cast<int>(a.bits), hidden = 8 - bits;
  const Plane codes(bits), residuals(hidden ? hidden : 1);
  const __m512 factor = _mm512_set1_ps(a.grad_factor), beta1 = _mm512_set1_ps(a.beta1),
               beta2 = _mm512_set1_ps(a.beta2), rest1 = _mm512_set1_ps(a.one_minus_beta1),
               rest2 = _mm512_set1_ps(a.one_minus_beta2), correct1 = _mm512_set1_ps(a.inverse_correction1),
               correct2 = _mm512_set1_ps(a.inverse_correction2), eps = _mm512_set1_ps(a.eps);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const float* grad = static_cast<const float*>(a.grad);
  const uint16_t* half_grad = static_cast<const uint16_t*>(a.grad);
  const bool half = a.grad_dtype == BFLOAT16;
  alignas(64) float rate[BLOCK], first_values[BLOCK], second_values[BLOCK], moves[BLOCK];
  alignas(64) uint32_t noise[BLOCK];
  int64_t same_rate_until = -1;
  for (int64_t start = first; start < last; start += BLOCK) {
    // A row's rate stays in place as long as the row does.
    if (start + BLOCK > same_rate_until || same_rate_until < 0) {
      spread_rates(rates, a.columns, start, BLOCK, rate);
      const int64_t row_end = (start / a.columns + 1) * a.columns;
      same_rate_until = row_end >= start + BLOCK ? row_end : -1;
    }
    const __m512i high = spread(static_cast<int>(hash32(static_cast<uint32_t>(start >> 32))));
    const __m512i low = _mm512_add_epi32(lane, spread(static_cast<int>(start)));
    uint8_t* first_codes = static_cast<uint8_t*>(a.exp_avg_l) + start / BLOCK * ROW;
    uint8_t* second_codes = static_cast<uint8_t*>(a.exp_avg_s) + start / BLOCK * ROW;
    __m512 first_unit = _mm512_setzero_ps(), second_unit = first_unit;
    if (first_kind == MOMENT_8BIT) first_unit = _mm512_set1_ps(float_of(*reinterpret_cast<uint32_t*>(first_codes + BLOCK)));
    if (second_kind == MOMENT_8BIT)
      second_unit = _mm512_set1_ps(float_of(*reinterpret_cast<uint32_t*>(second_codes + BLOCK)));
    __m512i first_largest = _mm512_setzero_si512(), second_largest = first_largest;
    const __m512i sizes = spread(0x7fffffff);
#pragma GCC unroll 2
    for (int j = 0; j < BLOCK; j += 16) {
      const int64_t i = start + j;
      __m512 g;
      if (half) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half_grad + i));
        g = as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      } else {
        g = _mm512_loadu_ps(grad + i);
      }
      g = _mm512_mul_ps(g, factor);
      __m512i random = _mm512_setzero_si512();
      if (noisy) {
        const __m512i index = _mm512_xor_si512(_mm512_add_epi32(low, spread(j)), high);
        random = hash(_mm512_xor_si512(index, spread(static_cast<int>(a.moment_key))));
        if (first_kind == MOMENT_8BIT || second_kind == MOMENT_8BIT) _mm512_store_si512(noise + j, random);
      }
      __m512 numerator = g;
      if (first_kind != NO_MOMENT) {
        const __m512 before = load<first_kind, true>(a.exp_avg_l, i, first_codes, first_unit);
        const __m512 m = _mm512_add_ps(_mm512_mul_ps(before, beta1), _mm512_mul_ps(g, rest1));
        store<first_kind, true>(a.exp_avg_l, i, m, random);
        if (first_kind == MOMENT_8BIT) {
          _mm512_store_ps(first_values + j, m);
          first_largest = _mm512_max_epu32(first_largest, _mm512_and_si512(as_bits(m), sizes));
        }
        numerator = _mm512_mul_ps(m, correct1);
      }
      if (second_kind != NO_MOMENT) {
        const __m512 before = load<second_kind, false>(a.exp_avg_s, i, second_codes, second_unit);
        const __m512 v = _mm512_add_ps(_mm512_mul_ps(before, beta2), _mm512_mul_ps(_mm512_mul_ps(g, g), rest2));
        store<second_kind, false>(a.exp_avg_s, i, v, random);
        if (second_kind == MOMENT_8BIT) {
          _mm512_store_ps(second_values + j, v);
          second_largest = _mm512_max_epu32(second_largest, _mm512_and_si512(as_bits(v), sizes));
        }
        const __m512 root = _mm512_sqrt_ps(_mm512_mul_ps(v, correct2));
        numerator = _mm512_div_ps(numerator, _mm512_add_ps(root, eps));
      }
      const __m512 move = _mm512_mul_ps(numerator, _mm512_load_ps(rate + j));
      _mm512_store_ps(moves + j, _mm512_xor_ps(move, _mm512_set1_ps(-0.0f)));
    }
    if (first_kind == MOMENT_8BIT) store_block<true>(first_codes, first_values, noise, first_largest);
    if (second_kind == MOMENT_8BIT) store_block<false>(second_codes, second_values, noise, second_largest);
    for (int j = 0; j < BLOCK; j += 64) {
      uint8_t* code_place = a.packed + (start + j) / 8 * bits;
      uint8_t* residual_place = a.residual + (start + j) / 8 * hidden;
      __m512i level = codes.load(code_place);
      if (hidden) level = _mm512_or_si512(shift_left(level, hidden), residuals.load(residual_place));
      __m128i quarters[4] = {_mm512_castsi512_si128(level), _mm512_extracti32x4_epi32(level, 1),
                             _mm512_extracti32x4_epi32(level, 2), _mm512_extracti32x4_epi32(level, 3)};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const int k = j + 16 * q;
        const __m512i index = _mm512_xor_si512(_mm512_add_epi32(low, spread(k)), high);
        const __m512i random = hash(_mm512_xor_si512(index, spread(static_cast<int>(a.code_key))));
        quarters[q] = moved(quarters[q], _mm512_load_ps(moves + k), random);
      }
      level = _mm512_inserti32x4(_mm512_castsi128_si512(quarters[0]), quarters[1], 1);
      level = _mm512_inserti32x4(_mm512_inserti32x4(level, quarters[2], 2), quarters[3], 3);
      codes.store(code_place, hidden ? shift_right(level, hidden) : level);
      if (hidden)
        residuals.store(residual_place,
                        _mm512_and_si512(level, _mm512_set1_epi8(static_cast<char>((1 << hidden) - 1))));
    }
  }
}

using BlocksFunction = void (*)(const UpdateArguments&, const float*, int64_t, int64_t);

template <int first_kind>
BlocksFunction with_second(int64_t kind) {
  switch (kind) {
    case NO_MOMENT:
    case MOMENT_CHANNEL: return update_blocks<first_kind, NO_MOMENT>;
    case MOMENT_FLOAT32: return update_blocks<first_kind, MOMENT_FLOAT32>;
    case MOMENT_BFLOAT16: return update_blocks<first_kind, MOMENT_BFLOAT16>;
    case MOMENT_8BIT: return update_blocks<first_kind, MOMENT_8BIT>;
    default: return nullptr;
  }
}

BlocksFunction blocks_function(const UpdateArguments& a) {
  if (a.add || a.grad_dtype == FLOAT16) return nullptr;
  switch (a.l_kind) {
    case NO_MOMENT: return with_second<NO_MOMENT>(a.s_kind);
    case MOMENT_FLOAT32: return with_second<MOMENT_FLOAT32>(a.s_kind);
    case MOMENT_BFLOAT16: return with_second<MOMENT_BFLOAT16>(a.s_kind);
    case MOMENT_8BIT: return with_second<MOMENT_8BIT>(a.s_kind);
    default: return nullptr;
  }
}

}  // namespace

void update_avx512(const UpdateArguments& arguments, const float* rates, int64_t first, int64_t last) {
  if (const BlocksFunction blocks = blocks_function(arguments)) {
    const int64_t whole = first + (last - first) / BLOCK * BLOCK;
    blocks(arguments, rates, first, whole);
    first = whole;
  }
  if (first < last) update(arguments, rates, first, last);
}

void row_moment_avx512(const UpdateArguments& arguments, float* scratch, int64_t first, int64_t last) {
  row_moment(arguments, scratch, first, last);
}

}  // namespace bitorch_engine
