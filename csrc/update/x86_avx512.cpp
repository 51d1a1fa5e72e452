#include <immintrin.h>

// gcc 12 warns of the undefined operands that its own intrinsics pass on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "update/block.h"

namespace bitorch_engine {
namespace {

// Where the bytes of 64 packed values of `bits` bits are. A group of eight values is a quadword, before and behind.
struct alignas(64) Places {
  uint8_t spread[64];   // quadword q takes the bytes from q * bits on
  uint8_t offsets[64];  // value k of a group starts at bit k * bits
  uint8_t collect[64];  // the inverse of spread: the lowest `bits` bytes of each quadword

  constexpr explicit Places(int bits) : spread(), offsets(), collect() {
    for (int q = 0; q < 8; ++q) {
      for (int j = 0; j < 8; ++j) {
        spread[8 * q + j] = static_cast<uint8_t>(q * bits + j);
        offsets[8 * q + j] = static_cast<uint8_t>(j * bits);
        if (j < bits) collect[q * bits + j] = static_cast<uint8_t>(8 * q + j);
      }
    }
  }
};
constexpr Places places[9] = {Places(0), Places(1), Places(2), Places(3), Places(4),
                              Places(5), Places(6), Places(7), Places(8)};

struct alignas(64) EvenBytes {
  uint8_t at[64];
  constexpr EvenBytes() : at() {
    for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(2 * i);
  }
};
constexpr EvenBytes even_bytes;

// Where the upper halves of 16 integers come from, of 32 words in a row, and which bytes these are.
struct alignas(64) UpperHalves {
  uint8_t at[64];
  uint64_t there;
  constexpr UpperHalves() : at(), there(0xCCCCCCCCCCCCCCCC) {
    for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i / 4 * 2 + i % 2);
  }
};
constexpr UpperHalves upper_halves;

// And where they go to, from two vectors.
struct alignas(64) OddWords {
  uint16_t at[32];
  constexpr OddWords() : at() {
    for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
  }
};
constexpr OddWords odd_words;

// One plane of 64 values of `bits` bits, 8 * bits bytes, from and to 64 bytes.
struct Plane {
  int bits;
  __mmask64 bytes;  // those that are there
  __m512i spread, offsets, collect;
  __m512i mask;         // of a value
  __m512i pair, quad;   // factors that put two values, then two pairs, one above the other
  __m512i low_half;     // the first four values of a group
  __m128i upper_shift;  // brings the other four next to them

  Plane(int bits, int shift) : bits(bits) {  // shift: of a value within a level
    bytes = bits == 8 ? ~__mmask64{0} : (__mmask64{1} << (8 * bits)) - 1;
    spread = _mm512_load_si512(places[bits].spread);
    offsets = _mm512_sub_epi8(_mm512_load_si512(places[bits].offsets), _mm512_set1_epi8(static_cast<char>(shift)));
    collect = _mm512_load_si512(places[bits].collect);
    mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    pair = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << bits << 8));
    quad = _mm512_set1_epi32(static_cast<int32_t>(1u | 1u << (2 * bits) << 16));
    low_half = _mm512_set1_epi64((int64_t{1} << (4 * bits)) - 1);
    upper_shift = _mm_cvtsi32_si128(32 - 4 * bits);
  }

  // Each value at the bits of its byte that it takes in a level, among others.
  __m512i spread_out(const uint8_t* at) const {
    return _mm512_multishift_epi64_epi8(offsets, _mm512_permutexvar_epi8(spread, _mm512_maskz_loadu_epi8(bytes, at)));
  }
  void write(uint8_t* at, __m512i values) const {
    if (bits == 8) return _mm512_storeu_si512(at, values);
    const __m512i quads = _mm512_madd_epi16(_mm512_maddubs_epi16(pair, values), quad);
    const __m512i groups = _mm512_ternarylogic_epi64(quads, _mm512_srl_epi64(quads, upper_shift), low_half, 0xE4);
    store(at, _mm512_permutexvar_epi8(collect, groups));
  }
  // Not by one masked store: the next block's loads would overlap with what it leaves alone, and may wait until it is
  // done.
  void store(uint8_t* at, __m512i x) const {
    __m256i part = _mm512_castsi512_si256(x);
    if (bits & 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), part);
      part = _mm512_extracti64x4_epi64(x, 1);
      at += 32;
    }
    __m128i rest = _mm256_castsi256_si128(part);
    if (bits & 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), rest);
      rest = _mm256_extracti128_si256(part, 1);
      at += 16;
    }
    if (bits & 1) _mm_storel_epi64(reinterpret_cast<__m128i*>(at), rest);
  }
};

struct Planes {
  int hidden;
  Plane index, residual;
};

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int width = 16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_int(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static F floats(float x) { return _mm512_set1_ps(x); }
  static I ints(int32_t x) { return _mm512_set1_epi32(x); }
  static F as_float(I x) { return _mm512_castsi512_ps(x); }
  static I as_int(F x) { return _mm512_castps_si512(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F root(F x) { return _mm512_sqrt_ps(x); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F max_size(F a, F b) { return _mm512_range_ps(a, b, 0xB); }  // of sizes, without sign
  static F where_less(F a, F b, F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
  static I nearest(F x) { return _mm512_cvtps_epi32(x); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  static I with_sign(I x, I y) { return _mm512_ternarylogic_epi32(x, y, ints(INT32_MIN), 0xF8); }
  template <int n>
  static I left(I x) {
    return _mm512_slli_epi32(x, n);
  }
  template <int n>
  static I right(I x) {
    if constexpr (n == 16) {
      // By a shuffle: Intel's processors have one port for shifts of 512 bits, and the other for these.
      const __m128i upper = _mm_setr_epi32(static_cast<int>(0x80800302), static_cast<int>(0x80800706),
                                           static_cast<int>(0x80800B0A), static_cast<int>(0x80800F0E));
      return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(upper));
    }
    return _mm512_srli_epi32(x, n);
  }
  template <int n>
  static I right_signed(I x) {
    return _mm512_srai_epi32(x, n);
  }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }

  // The order of a four is that of the elements.
  static void lanes4(I* out) {
    out[0] = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int k = 1; k < 4; ++k) out[k] = add(out[k - 1], ints(16));
  }
  static void load4(const float* p, F* out) {
    for (int k = 0; k < 4; ++k) out[k] = load(p + 16 * k);
  }
  static void store4(float* p, const F* in) {
    for (int k = 0; k < 4; ++k) store(p + 16 * k, in[k]);
  }
  static __m256i load_words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void load_tops4(const uint16_t* p, I* out) {
    const __m512i low = _mm512_load_si512(upper_halves.at), high = _mm512_add_epi8(low, _mm512_set1_epi8(32));
    for (int k = 0; k < 4; k += 2) {
      const __m512i words = _mm512_loadu_si512(p + 16 * k);
      out[k] = _mm512_maskz_permutexvar_epi8(upper_halves.there, low, words);
      out[k + 1] = _mm512_maskz_permutexvar_epi8(upper_halves.there, high, words);
    }
  }
  static void store_tops4(uint16_t* p, const I* in) {
    const __m512i odd = _mm512_load_si512(odd_words.at);
    for (int k = 0; k < 4; k += 2) _mm512_storeu_si512(p + 16 * k, _mm512_permutex2var_epi16(in[k], odd, in[k + 1]));
  }
  static void load_halves4(const uint16_t* p, F* out) {
    for (int k = 0; k < 4; ++k) out[k] = _mm512_cvtph_ps(load_words(p + 16 * k));
  }
  static void store_halves4(uint16_t* p, const F* in) {
    for (int k = 0; k < 4; ++k) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * k), _mm512_cvtps_ph(in[k], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  template <int cut, bool is_signed>
  static void load_codes4(const uint8_t* p, I* out) {
    for (int k = 0; k < 4; ++k) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * k));
      out[k] = left<cut>(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
      if constexpr (is_signed) out[k] = and_(out[k], ints(INT32_MIN | 0x7F << cut));
    }
  }
  // From the order of packing four vectors to that of the elements, and back: a transposition.
  static __m512i in_order(__m512i bytes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
  }
  static void store_signed4(uint8_t* p, int32_t base, const I* in) {
    const __m512i low = signed_codes(_mm512_packus_epi32(in[0], in[1]), base);
    const __m512i high = signed_codes(_mm512_packus_epi32(in[2], in[3]), base);
    _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(low, high)));
  }
  static void store_positive4(uint8_t* p, int32_t base, const I* in, const I* values) {
    const __m512i bases = _mm512_set1_epi16(static_cast<int16_t>(base));
    const __m512i low = _mm512_sub_epi16(_mm512_packs_epi32(in[0], in[1]), bases);
    const __m512i high = _mm512_sub_epi16(_mm512_packs_epi32(in[2], in[3]), bases);
    // Packing saturates, and what is above 0 stays that.
    const __m512i sizes = _mm512_packus_epi16(_mm512_packs_epi32(values[0], values[1]),
                                              _mm512_packs_epi32(values[2], values[3]));
    const __m512i least = _mm512_min_epu8(sizes, _mm512_set1_epi8(1));
    _mm512_storeu_si512(p, in_order(_mm512_max_epu8(_mm512_packus_epi16(low, high), least)));
  }
  static __m512i signed_codes(__m512i words, int32_t base) {
    words = _mm512_sub_epi16(words, _mm512_set1_epi16(static_cast<int16_t>(base)));
    return _mm512_ternarylogic_epi32(words, _mm512_srli_epi16(words, 5), _mm512_set1_epi16(0x7F), 0xE4);
  }
  static void move_levels4(uint8_t* p, const I* steps) {
    // Bytes in the order in which words unpack and pack.
    const __m512i zero = _mm512_setzero_si512(), bytes = in_order(_mm512_load_si512(p));
    const __m512i low = _mm512_add_epi16(_mm512_unpacklo_epi8(bytes, zero), _mm512_packs_epi32(steps[0], steps[1]));
    const __m512i high = _mm512_add_epi16(_mm512_unpackhi_epi8(bytes, zero), _mm512_packs_epi32(steps[2], steps[3]));
    _mm512_store_si512(p, in_order(_mm512_packus_epi16(low, high)));
  }

  static Planes planes(int bits) { return {8 - bits, Plane(bits, 8 - bits), Plane(8 - bits, 0)}; }
  static void read_levels(const Planes& planes, const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    for (int i = 0; i < BLOCK; i += 64) {
      const __m512i index = planes.index.spread_out(packed + i / 8 * planes.index.bits);
      const __m512i low = planes.residual.spread_out(residual + i / 8 * planes.residual.bits);
      _mm512_store_si512(levels + i, _mm512_ternarylogic_epi32(index, low, planes.residual.mask, 0xD8));
    }
  }
  static void write_levels(const Planes& planes, const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    if (planes.hidden == 4) return write_nibbles(levels, packed, residual);
    const __m128i hidden = _mm_cvtsi32_si128(planes.hidden);
    for (int i = 0; i < BLOCK; i += 64) {
      const __m512i level = _mm512_load_si512(levels + i);
      const __m512i index = _mm512_and_si512(_mm512_srl_epi16(level, hidden), planes.index.mask);
      planes.index.write(packed + i / 8 * planes.index.bits, index);
      if (planes.hidden == 0) continue;
      const __m512i low = _mm512_and_si512(level, planes.residual.mask);
      planes.residual.write(residual + i / 8 * planes.residual.bits, low);
    }
  }
  // Words of two levels: their upper nibbles, then their lower ones, as one byte.
  static void write_nibbles(const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    const __m512i low = _mm512_set1_epi16(0x0F), even = _mm512_load_si512(even_bytes.at);
    const __m512i first = _mm512_load_si512(levels), second = _mm512_load_si512(levels + 64);
    const __m512i a = _mm512_srli_epi16(first, 4), b = _mm512_srli_epi16(second, 4);
    const __m512i index_a = _mm512_ternarylogic_epi32(a, _mm512_srli_epi16(first, 8), low, 0xE4);
    const __m512i index_b = _mm512_ternarylogic_epi32(b, _mm512_srli_epi16(second, 8), low, 0xE4);
    _mm512_storeu_si512(packed, _mm512_permutex2var_epi8(index_a, even, index_b));
    const __m512i low_a = _mm512_ternarylogic_epi32(first, a, low, 0xE4);
    const __m512i low_b = _mm512_ternarylogic_epi32(second, b, low, 0xE4);
    _mm512_storeu_si512(residual, _mm512_permutex2var_epi8(low_a, even, low_b));
  }
};

}  // namespace

void update_avx512(const StepRule& rule, const Blocks& blocks) { step_any_blocks<Avx512>(rule, blocks); }

float mean_square_avx512(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                         int64_t stride) {
  return mean_square_here<Avx512>(grad, bf16, factor, count, scratch, ahead, stride);
}

bool within_avx512(const float* values, int64_t count, float limit) {
  return within_here<Avx512>(values, count, limit);
}

}  // namespace bitorch_engine
