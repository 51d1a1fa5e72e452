#include <immintrin.h>

#include "binary/binary.h"
#include "qconv/product.h"

namespace bitorch_engine {
namespace binary {
namespace {

// MR pixels times NV blocks. The accumulators stay in registers only in a function that is nothing but this loop, with
// constant bounds: 24 of them, 4 vectors of weights, and one broadcast.
template <int MR, int NV>
void tile(const Tile& t) {
  __m512i differing[MR][NV];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) differing[m][j] = _mm512_setzero_si512();
  const int64_t block = t.block_words;
  for (const Segment *s = t.segments, *end = s + t.segment_count; s < end; ++s) {
    const uint32_t* weights = t.weights + s->weights * LANES;
    const uint32_t* pixel[MR];
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) pixel[m] = t.image + s->image + m * t.image_step;
    for (int64_t k = 0; k < s->words; ++k, weights += LANES) {
      __m512i w[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) w[j] = _mm512_loadu_si512(weights + j * block);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(pixel[m][k]));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          differing[m][j] = _mm512_add_epi32(differing[m][j], _mm512_popcnt_epi32(_mm512_xor_si512(w[j], x)));
      }
    }
  }
  if (t.totals) {
    const __m512i products = _mm512_set1_epi32(t.products);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        _mm512_storeu_si512(t.totals + m * COLUMNS + j * LANES,
                            _mm512_sub_epi32(products, _mm512_slli_epi32(differing[m][j], 1)));
    return;
  }
  // Every number up to 2**24 is exact here: only the last two operations round, and without `added` only the first one.
  const __m512 products = _mm512_set1_ps(static_cast<float>(t.products)), two = _mm512_set1_ps(2);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const __m512 factor = _mm512_loadu_ps(t.factor + j * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const __m512 total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(differing[m][j]), two, products);
      __m512 value = _mm512_mul_ps(total, factor);
      if (t.added) value = _mm512_add_ps(value, _mm512_loadu_ps(t.added + j * LANES));
      _mm512_storeu_ps(t.out + m * t.out_step + j * LANES, value);
    }
  }
}

constexpr MultiplyFunction TILES[6][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

template <Dtype dtype>
__m512 load(const void* x, int64_t i, __mmask16 mask) {
  if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
  if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

struct Signs {
  __m512 inverse;
  __m512 odd = _mm512_setzero_ps();  // NaN where a value was not finite

  __mmask16 of(__m512 x) {
    odd = _mm512_fmadd_ps(x, _mm512_setzero_ps(), odd);
    return _mm512_cmp_ps_mask(_mm512_mul_ps(x, inverse), _mm512_setzero_ps(), _CMP_NLT_UQ);
  }
};

bool any_odd(const Signs (&signs)[4]) {
  const __m512 first = _mm512_add_ps(signs[0].odd, signs[1].odd);
  const __m512 odd = _mm512_add_ps(first, _mm512_add_ps(signs[2].odd, signs[3].odd));
  return _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) != 0;
}

// Channels lie together: a comparison gives the bits in their order.
template <Dtype dtype>
void sign_run(const void* x, int64_t start, int64_t channels, uint32_t* out, Signs (&signs)[4]) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64, out += 2) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask16 bits = signs[j].of(load<dtype>(x, start + c + 16 * j, 0xffff));
      __builtin_memcpy(reinterpret_cast<char*>(out) + 2 * j, &bits, 2);
    }
  }
  for (; c < channels; c += WORD, ++out) {
    uint32_t present = channels - c < WORD ? (1u << (channels - c)) - 1 : ~0u, bits = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __mmask16 mask = static_cast<__mmask16>(present >> (16 * j));
      bits |= static_cast<uint32_t>(signs[j].of(load<dtype>(x, start + c + 16 * j, mask)) & mask) << (16 * j);
    }
    *out = bits;
  }
}

// Pixels lie together: each lane collects the bits of one pixel. 64 pixels at a time are four lines of the cache.
template <Dtype dtype>
void sign_planes(const Floats& f, uint32_t* out, int64_t out_stride, Signs (&signs)[4]) {
  for (int64_t p = 0; p < f.pixels; p += 64) {
    const int64_t some = f.pixels - p < 64 ? f.pixels - p : 64;
    const uint64_t present = ~uint64_t{0} >> (64 - some);
    for (int64_t c = 0; c < f.channels; c += WORD) {
      __m512i words[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) words[j] = _mm512_setzero_si512();
      const int64_t deep = f.channels - c < WORD ? f.channels - c : WORD;
      for (int64_t i = 0; i < deep; ++i) {
        const int64_t at = (c + i) * f.channel_stride + p;
        const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << i));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __mmask16 mask = static_cast<__mmask16>(present >> (16 * j));
          if (j == 0 || mask)
            words[j] = _mm512_mask_or_epi32(words[j], signs[j].of(load<dtype>(f.x, at + 16 * j, mask)), words[j], bit);
        }
      }
      alignas(64) uint32_t column[64];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_store_si512(column + 16 * j, words[j]);
      uint32_t* to = out + p * out_stride + c / WORD;
      for (int64_t i = 0; i < some; ++i) to[i * out_stride] = column[i];
    }
  }
}

template <Dtype dtype>
bool sign_all(const Floats& f, uint32_t* out, int64_t out_stride) {
  Signs signs[4];
  for (Signs& s : signs) s.inverse = _mm512_set1_ps(f.inverse_scale);
  if (f.channel_stride == 1)
    for (int64_t p = 0; p < f.pixels; ++p)
      sign_run<dtype>(f.x, p * f.pixel_stride, f.channels, out + p * out_stride, signs);
  else
    sign_planes<dtype>(f, out, out_stride, signs);
  return any_odd(signs);
}

}  // namespace

void multiply_avx512(const Tile& t) { TILES[t.count - 1][t.blocks - 1](t); }

bool sign_avx512(const Floats& f, uint32_t* out, int64_t out_stride) {
  if (f.channel_stride != 1 && f.pixel_stride != 1) return sign_scalar(f, out, out_stride);
  switch (f.dtype) {
    case FLOAT32: return sign_all<FLOAT32>(f, out, out_stride);
    case BFLOAT16: return sign_all<BFLOAT16>(f, out, out_stride);
    default: return sign_all<FLOAT16>(f, out, out_stride);
  }
}

// A lane takes up to 25 bits of one channel, wherever in a byte they begin; one tap of 16 channels is then one test.
void arrange_avx512(const uint8_t* row, int first, int64_t channels, int64_t taps, uint32_t* out) {
  constexpr int64_t DEEPEST = 25;
  const int64_t words = (channels + WORD - 1) / WORD;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i apart = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(taps)));
  for (int64_t c = 0; c < words * WORD; c += 16) {
    const int64_t some = channels - c < 16 ? (channels - c < 0 ? 0 : channels - c) : 16;
    const __mmask16 present = static_cast<__mmask16>((1 << some) - 1);
    for (int64_t t = 0; t < taps; t += DEEPEST) {
      const int64_t start = first + c * taps + t;
      const __m512i bit = _mm512_add_epi32(apart, _mm512_set1_epi32(static_cast<int>(start & 7)));
      const __m512i bytes = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present, _mm512_srli_epi32(bit, 3),
                                                        row + (start >> 3), 1);
      const __m512i taken = _mm512_srlv_epi32(bytes, _mm512_and_si512(bit, _mm512_set1_epi32(7)));
      char* to = reinterpret_cast<char*>(out + (t * words + c / WORD) * LANES) + c % WORD / 8;
      __m512i mask = _mm512_set1_epi32(1);
      for (int64_t i = t; i < taps && i < t + DEEPEST; ++i, to += words * LANES * 4) {
        const __mmask16 bits = _mm512_test_epi32_mask(taken, mask);
        __builtin_memcpy(to, &bits, 2);
        mask = _mm512_add_epi32(mask, mask);
      }
    }
  }
}

}  // namespace binary
}  // namespace bitorch_engine
