#include <immintrin.h>

#include "update/block.h"

namespace bitorch_engine {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int width = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_int(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_signed_bytes(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_halves(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F floats(float x) { return _mm256_set1_ps(x); }
  static I ints(int32_t x) { return _mm256_set1_epi32(x); }
  static I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static F as_float(I x) { return _mm256_castsi256_ps(x); }
  static I as_int(F x) { return _mm256_castps_si256(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F root(F x) { return _mm256_sqrt_ps(x); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F max_size(F a, F b) { return max(a, _mm256_andnot_ps(floats(-0.0f), b)); }
  static F where_less(F a, F b, F x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), x); }
  static I nearest(F x) { return _mm256_cvtps_epi32(x); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static I left(I x) {
    return _mm256_slli_epi32(x, n);
  }
  template <int n>
  static I right(I x) {
    return _mm256_srli_epi32(x, n);
  }
  template <int n>
  static I right_signed(I x) {
    return _mm256_srai_epi32(x, n);
  }
  static float largest(F x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static F from_half(I half) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xD8);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  }
  static I to_half(F x) { return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

  static void narrow_bytes(const int32_t* in, uint8_t* out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < BLOCK; i += 32) {
      const __m256i low = _mm256_packs_epi32(load_int(in + i), load_int(in + i + 8));
      const __m256i high = _mm256_packs_epi32(load_int(in + i + 16), load_int(in + i + 24));
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
    }
  }
  static void narrow_signed(const int32_t* in, int32_t base, uint8_t* out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < BLOCK; i += 32) {
      const __m256i low = signed_codes(_mm256_packus_epi32(load_int(in + i), load_int(in + i + 8)), base);
      const __m256i high = signed_codes(_mm256_packus_epi32(load_int(in + i + 16), load_int(in + i + 24)), base);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
    }
  }
  static __m256i signed_codes(__m256i words, int32_t base) {
    words = _mm256_sub_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(base)));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(words, 5), _mm256_set1_epi16(0x80));
    return _mm256_or_si256(_mm256_and_si256(words, _mm256_set1_epi16(0x7F)), sign);
  }
  static void narrow_halves(const int32_t* in, uint16_t* out) {
    for (int i = 0; i < BLOCK; i += 16) {
      const __m256i both = _mm256_packus_epi32(load_int(in + i), load_int(in + i + 8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(both, 0xD8));
    }
  }

  static int planes(int bits) { return bits; }
  // Eight values are a number of `bits` bytes: pdep and pext move them from and to a byte each. Planes go through a copy,
  // because a number is read as eight bytes, of which the last ones may lie behind the plane.
  static void read_levels(int bits, const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    const int hidden = 8 - bits;
    const uint64_t index_mask = repeated((1 << bits) - 1) << hidden, low_mask = repeated((1 << hidden) - 1);
    uint8_t index[BLOCK + 8] = {}, low[BLOCK + 8] = {};
    copy(index, packed, bits);
    copy(low, residual, hidden);
    for (int i = 0; i < 16; ++i) {
      uint64_t high_word, low_word;
      std::memcpy(&high_word, index + i * bits, 8);
      std::memcpy(&low_word, low + i * hidden, 8);
      const uint64_t eight = _pdep_u64(high_word, index_mask) | _pdep_u64(low_word, low_mask);
      std::memcpy(levels + 8 * i, &eight, 8);
    }
  }
  static void write_levels(int bits, const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    const int hidden = 8 - bits;
    const uint64_t index_mask = repeated((1 << bits) - 1) << hidden, low_mask = repeated((1 << hidden) - 1);
    uint8_t index[BLOCK + 8], low[BLOCK + 8];
    for (int i = 0; i < 16; ++i) {
      uint64_t eight;
      std::memcpy(&eight, levels + 8 * i, 8);
      const uint64_t high_word = _pext_u64(eight, index_mask), low_word = _pext_u64(eight, low_mask);
      std::memcpy(index + i * bits, &high_word, 8);  // the next one writes over the zeros behind
      std::memcpy(low + i * hidden, &low_word, 8);
    }
    copy(packed, index, bits);
    copy(residual, low, hidden);
  }

  static uint64_t repeated(int byte) { return 0x0101010101010101u * static_cast<uint64_t>(byte); }
  static void copy(uint8_t* to, const uint8_t* from, int bits) {  // 128 values
    for (int i = 0; i < bits; ++i) std::memcpy(to + 16 * i, from + 16 * i, 16);
  }
};

}  // namespace

void update_avx2(const StepRule& rule, const Blocks& blocks) { step_any_blocks<Avx2>(rule, blocks); }

float mean_square_avx2(const void* grad, int bf16, float factor, int64_t count, float* scratch) {
  return mean_square_here(grad, bf16, factor, count, scratch);
}

bool within_avx2(const float* values, int64_t count, float limit) { return within_here<Avx2>(values, count, limit); }

}  // namespace bitorch_engine
