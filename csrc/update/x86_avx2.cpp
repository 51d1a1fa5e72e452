#include <immintrin.h>

#include "update/block.h"

namespace bitorch_engine {
namespace {

// Where the bits of 128 packed values of `bits` bits are, 32 at a time: 16 to each half of a vector, in two words of
// eight.
struct alignas(32) Windows {
  uint8_t bytes[4][2][32];  // two bytes that hold the value, for each word
  uint16_t lift[16];        // what brings it to the top of the word
  int at[8];                // where each half is read: 16 bytes, none of them behind the last one

  constexpr explicit Windows(int bits) : bytes(), lift(), at() {
    for (int half = 0; half < 8; ++half) {
      const int start = 2 * bits * half, last = 16 * bits - 16;
      at[half] = start < last ? start : last;
      for (int i = 0; i < 32; ++i) {  // word, group of eight and value in it, byte
        const int value = i / 2 % 8, byte = start - at[half] + i / 16 * bits + value * bits / 8 + i % 2;
        bytes[half / 2][i / 16][half % 2 * 16 + i % 16] = static_cast<uint8_t>(byte < 16 ? byte : 0x80);
        lift[half % 2 * 8 + value] = static_cast<uint16_t>(1 << (16 - bits - value * bits % 8));
      }
    }
  }
};
template <int bits>
constexpr Windows windows = Windows(bits);

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int width = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_int(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static F floats(float x) { return _mm256_set1_ps(x); }
  static I ints(int32_t x) { return _mm256_set1_epi32(x); }
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
  static I with_sign(I x, I y) { return or_(and_(y, ints(INT32_MIN)), x); }
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

  // The order of a four is that in which 32 bytes unpack: its first vector has the elements 0 .. 3 and 16 .. 19, the
  // next one four more, and so on. No element then leaves its 128 bits on the way from bytes to floats and back.
  static void lanes4(I* out) {
    out[0] = _mm256_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19);
    for (int k = 1; k < 4; ++k) out[k] = add(out[k - 1], ints(4));
  }
  template <class T>
  static __m256i load_apart(const T* low, const T* high) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
  }
  template <class T>
  static void store_apart(T* low, T* high, __m256i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(x, 1));
  }
  static void load4(const float* p, F* out) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) out[k] = as_float(load_apart(p + 4 * k, p + 16 + 4 * k));
  }
  static void store4(float* p, const F* in) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store_apart(p + 4 * k, p + 16 + 4 * k, as_int(in[k]));
  }
  static void load_tops4(const uint16_t* p, I* out) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i even = load_apart(p, p + 16), odd = load_apart(p + 8, p + 24);
    out[0] = _mm256_unpacklo_epi16(zero, even), out[1] = _mm256_unpackhi_epi16(zero, even);
    out[2] = _mm256_unpacklo_epi16(zero, odd), out[3] = _mm256_unpackhi_epi16(zero, odd);
  }
  static void store_tops4(uint16_t* p, const I* in) {
    store_apart(p, p + 16, _mm256_packus_epi32(right<16>(in[0]), right<16>(in[1])));
    store_apart(p + 8, p + 24, _mm256_packus_epi32(right<16>(in[2]), right<16>(in[3])));
  }
  static void load_halves4(const uint16_t* p, F* out) {
    F in[4];
    for (int k = 0; k < 4; ++k) in[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * k)));
    for (int k = 0; k < 2; ++k) {
      out[2 * k] = _mm256_permute2f128_ps(in[k], in[k + 2], 0x20);
      out[2 * k + 1] = _mm256_permute2f128_ps(in[k], in[k + 2], 0x31);
    }
  }
  static void store_halves4(uint16_t* p, const F* in) {
    for (int k = 0; k < 2; ++k) {
      const F low = _mm256_permute2f128_ps(in[2 * k], in[2 * k + 1], 0x20);
      const F high = _mm256_permute2f128_ps(in[2 * k], in[2 * k + 1], 0x31);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * k), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * k + 16), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    }
  }
  template <int cut, bool is_signed>
  static void load_codes4(const uint8_t* p, I* out) {
    const __m256i zero = _mm256_setzero_si256(), bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const auto in_place = [](__m256i words) {  // as the upper halves, which have all bits of the result
      if constexpr (!is_signed) return _mm256_srli_epi16(words, 24 - cut);
      return _mm256_and_si256(_mm256_srai_epi16(words, 24 - cut),
                              _mm256_set1_epi16(static_cast<int16_t>(0x8000 | 0x7F << (cut - 16))));
    };
    const __m256i even = in_place(_mm256_unpacklo_epi8(zero, bytes)), odd = in_place(_mm256_unpackhi_epi8(zero, bytes));
    out[0] = _mm256_unpacklo_epi16(zero, even), out[1] = _mm256_unpackhi_epi16(zero, even);
    out[2] = _mm256_unpacklo_epi16(zero, odd), out[3] = _mm256_unpackhi_epi16(zero, odd);
  }
  static void store_signed4(uint8_t* p, int32_t base, const I* in) {
    const __m256i even = signed_codes(_mm256_packus_epi32(in[0], in[1]), base);
    const __m256i odd = signed_codes(_mm256_packus_epi32(in[2], in[3]), base);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_packus_epi16(even, odd));
  }
  static __m256i signed_codes(__m256i words, int32_t base) {  // upper byte: 0 or 16, the sign, which comes to be 128
    words = _mm256_sub_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(base)));
    return _mm256_maddubs_epi16(words, _mm256_set1_epi16(0x0801));
  }
  static void store_positive4(uint8_t* p, int32_t base, const I* in, const I* values) {
    const __m256i bases = _mm256_set1_epi16(static_cast<int16_t>(base));
    const __m256i even = _mm256_sub_epi16(_mm256_packs_epi32(in[0], in[1]), bases);
    const __m256i odd = _mm256_sub_epi16(_mm256_packs_epi32(in[2], in[3]), bases);
    // Packing saturates, and what is above 0 stays that.
    const __m256i sizes = _mm256_packus_epi16(_mm256_packs_epi32(values[0], values[1]),
                                              _mm256_packs_epi32(values[2], values[3]));
    const __m256i codes = _mm256_max_epu8(_mm256_packus_epi16(even, odd), _mm256_min_epu8(sizes, _mm256_set1_epi8(1)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
  }
  static void move_levels4(uint8_t* p, const I* steps) {
    const __m256i zero = _mm256_setzero_si256(), bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i even = _mm256_add_epi16(_mm256_unpacklo_epi8(bytes, zero), _mm256_packs_epi32(steps[0], steps[1]));
    const __m256i odd = _mm256_add_epi16(_mm256_unpackhi_epi8(bytes, zero), _mm256_packs_epi32(steps[2], steps[3]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm256_packus_epi16(even, odd));
  }

  static int planes(int bits) { return bits; }
  static void read_levels(int bits, const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    if (bits == 8) std::memcpy(levels, packed, BLOCK);
    if (bits == 4) read_nibbles(packed, residual, levels);
    if (bits != 8 && bits != 4) readers[bits](packed, residual, levels);
  }
  static void write_levels(int bits, const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    if (bits == 8) std::memcpy(packed, levels, BLOCK);
    if (bits == 4) write_nibbles(levels, packed, residual);
    if (bits != 8 && bits != 4) writers[bits](levels, packed, residual);
  }

  // 64 levels are 32 bytes of each plane; byte j has the elements 2 j and 2 j + 1.
  static void read_nibbles(const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    const __m256i low = _mm256_set1_epi8(0x0F);
    for (int i = 0; i < BLOCK; i += 64) {
      const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2));
      const __m256i rest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual + i / 2));
      const __m256i even =
          _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(index, low), 4), _mm256_and_si256(rest, low));
      const __m256i odd = _mm256_or_si256(_mm256_andnot_si256(low, index), _mm256_and_si256(right<4>(rest), low));
      const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
      const auto at = reinterpret_cast<__m256i*>(levels + i);  // whole vectors, as they are read: halves would wait
      _mm256_store_si256(at, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_store_si256(at + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
  }
  static void write_nibbles(const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    const __m256i low = _mm256_set1_epi8(0x0F);
    const auto pairs = [=](__m256i nibbles) {  // an even element, and 16 times the odd one above it
      return _mm256_maddubs_epi16(_mm256_and_si256(nibbles, low), _mm256_set1_epi16(0x1001));
    };
    for (int i = 0; i < BLOCK; i += 64) {
      const __m256i even = load_apart(levels + i, levels + i + 32), odd = load_apart(levels + i + 16, levels + i + 48);
      const __m256i index = _mm256_packus_epi16(pairs(right<4>(even)), pairs(right<4>(odd)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), index);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(residual + i / 2), _mm256_packus_epi16(pairs(even), pairs(odd)));
    }
  }

  // Of other widths, 64 values are `bits` words of 64 bits, and eight values a run of 8 * bits bits in them, which pext
  // collects. Values are spread by shuffles: pdep has a single port, and so has pext.
  template <int bits>
  static void add_run(uint64_t* words, int run, uint64_t value) {
    const int at = run * 8 * bits, word = at / 64, shift = at % 64;
    words[word] = shift == 0 ? value : words[word] | value << shift;
    if (shift + 8 * bits > 64) words[word + 1] = value >> (64 - shift);
  }
  template <int bits>
  static void read_words(const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    constexpr int hidden = 8 - bits;
    const __m256i mask = _mm256_set1_epi16(0xFF << hidden & 0xFF);
    for (int i = 0; i < 4; ++i) {
      const __m256i index = load_half_by_half<bits>(packed, i), low = load_half_by_half<hidden>(residual, i);
      __m256i words[2];
      for (int k = 0; k < 2; ++k) {
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(lifted<bits>(index, i, k), 8), mask);
        words[k] = _mm256_or_si256(high, _mm256_srli_epi16(lifted<hidden>(low, i, k), 16 - hidden));
      }
      const __m256i bytes = _mm256_packus_epi16(words[0], words[1]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(levels + 32 * i), bytes);
    }
  }
  template <int bits>
  static __m256i load_half_by_half(const uint8_t* plane, int i) {
    return load_apart(plane + windows<bits>.at[2 * i], plane + windows<bits>.at[2 * i + 1]);
  }
  template <int bits>
  static __m256i lifted(__m256i bytes, int i, int k) {
    const auto window = _mm256_load_si256(reinterpret_cast<const __m256i*>(windows<bits>.bytes[i][k]));
    const auto lift = _mm256_load_si256(reinterpret_cast<const __m256i*>(windows<bits>.lift));
    return _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, window), lift);
  }
  template <int bits>
  static void write_words(const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    constexpr int hidden = 8 - bits;
    constexpr uint64_t index_mask = repeated((1 << bits) - 1) << hidden, low_mask = repeated((1 << hidden) - 1);
    for (int i = 0; i < BLOCK; i += 64) {
      uint64_t index[bits], low[hidden];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        uint64_t eight;
        std::memcpy(&eight, levels + i + 8 * k, 8);
        add_run<bits>(index, k, _pext_u64(eight, index_mask));
        add_run<hidden>(low, k, _pext_u64(eight, low_mask));
      }
      std::memcpy(packed + i / 8 * bits, index, sizeof index);
      std::memcpy(residual + i / 8 * hidden, low, sizeof low);
    }
  }
  static constexpr uint64_t repeated(int byte) { return 0x0101010101010101u * static_cast<uint64_t>(byte); }

  using Reader = void (*)(const uint8_t*, const uint8_t*, uint8_t*);
  using Writer = void (*)(const uint8_t*, uint8_t*, uint8_t*);
  static constexpr Reader readers[8] = {nullptr,       read_words<1>, read_words<2>, read_words<3>,
                                        read_nibbles,  read_words<5>, read_words<6>, read_words<7>};
  static constexpr Writer writers[8] = {nullptr,       write_words<1>, write_words<2>, write_words<3>,
                                        write_nibbles, write_words<5>, write_words<6>, write_words<7>};
};

}  // namespace

void update_avx2(const StepRule& rule, const Blocks& blocks) { step_any_blocks<Avx2>(rule, blocks); }

float mean_square_avx2(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                       int64_t stride) {
  return mean_square_here<Avx2>(grad, bf16, factor, count, scratch, ahead, stride);
}

bool within_avx2(const float* values, int64_t count, float limit) { return within_here<Avx2>(values, count, limit); }

}  // namespace bitorch_engine
