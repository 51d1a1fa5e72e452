#include <immintrin.h>

#include "quantize/quantize.h"

namespace bitorch_engine {
namespace {

struct Rule {
  __m512 inverse, low, top;
  __m512 high;   // the highest code
  __m512i zero;  // in 16 bits, added to a code to get the index
  int shift;     // step as a power of two
  bool sign;     // 1 bit
};

struct Quantized {
  __m512i index;     // times step
  __mmask16 beyond;
};

template <Dtype dtype>
__m512 load(const void* x, int64_t i, __mmask16 mask) {
  if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
  if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <bool with_beyond>
Quantized quantize(__m512 x, const Rule& rule, __mmask16& odd) {
  const __mmask16 not_finite = _mm512_fpclass_ps_mask(x, 0x99);
  odd |= not_finite;
  __m512 ratio = _mm512_mul_ps(x, rule.inverse);
  if (__builtin_expect(not_finite, 0)) {
    const __mmask16 number = _mm512_cmp_ps_mask(ratio, ratio, _CMP_ORD_Q);
    ratio = _mm512_maskz_mov_ps(number, ratio);
  }
  Quantized q;
  q.beyond = 0;
  if (rule.sign) {
    const __mmask16 positive = _mm512_cmp_ps_mask(ratio, _mm512_setzero_ps(), _CMP_GE_OQ);
    q.index = _mm512_maskz_set1_epi32(positive, 1 << rule.shift);
    if (with_beyond) q.beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(ratio), _mm512_set1_ps(1), _CMP_GT_OQ);
    return q;
  }
  const __m512 rounded = _mm512_sub_ps(_mm512_roundscale_ps(ratio, 0), rule.low);
  const __m512 index = _mm512_min_ps(_mm512_max_ps(rounded, _mm512_setzero_ps()), rule.top);
  if (with_beyond) {
    const __mmask16 lowest = _mm512_cmp_ps_mask(index, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(ratio, rule.low, _CMP_LT_OQ);
    const __mmask16 above = _mm512_cmp_ps_mask(ratio, _mm512_add_ps(index, rule.low), _CMP_GT_OQ);
    q.beyond = static_cast<__mmask16>((lowest & below) | (~lowest & above));
  }
  q.index = _mm512_cvtps_epi32(index);
  return q;
}

// Four vectors of numbers to one of bytes, which saturate. Packing two by two works within 128-bit lanes; `order` puts
// the lanes back in order.
__m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d, __m512i added) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), added);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(c, d), added);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

// 64 values at a time, where numbers are finite: half the instructions of the loop below. Returns whether one was not,
// or did not fit a float when it was divided; then all are to be done again.
template <Dtype dtype, bool sign>
bool quantize_blocks(const void* x, int64_t start, int64_t count, const Rule& rule, uint8_t* out) {
  __m512 odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const __m512i one = _mm512_set1_epi8(static_cast<char>(1 << rule.shift));
  for (int64_t i = 0; i < count; i += 64) {
    __m512 ratio[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      ratio[j] = _mm512_mul_ps(load<dtype>(x, start + i + 16 * j, 0xffff), rule.inverse);
      odd[j % 2] = _mm512_fmadd_ps(ratio[j], _mm512_setzero_ps(), odd[j % 2]);
    }
    if (sign) {
      uint64_t positive = 0;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        positive |= uint64_t{_mm512_cmp_ps_mask(ratio[j], _mm512_setzero_ps(), _CMP_GE_OQ)} << (16 * j);
      _mm512_storeu_si512(out + i, _mm512_maskz_mov_epi8(positive, one));
      continue;
    }
    __m512i code[4];  // what is below the lowest code stays below 0 on its way to bytes
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) code[j] = _mm512_cvtps_epi32(_mm512_min_ps(ratio[j], rule.high));
    _mm512_storeu_si512(out + i, bytes_of(code[0], code[1], code[2], code[3], rule.zero));
  }
  const __m512 any = _mm512_add_ps(odd[0], odd[1]);
  return _mm512_cmp_ps_mask(any, any, _CMP_UNORD_Q) != 0;
}

// A run of values that lie together, in x and in out.
template <Dtype dtype, bool with_beyond>
__mmask16 quantize_run(const void* x, int64_t start, int64_t count, const Rule& rule, uint8_t* out, uint8_t* beyond) {
  __mmask16 odd = 0;
  int64_t i = 0;
  if (!with_beyond) {
    const int64_t whole = count & ~int64_t{63};
    const bool again = rule.sign ? quantize_blocks<dtype, true>(x, start, whole, rule, out)
                                 : quantize_blocks<dtype, false>(x, start, whole, rule, out);
    i = again ? 0 : whole;
  }
  for (; i + 64 <= count; i += 64) {
    Quantized q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) q[j] = quantize<with_beyond>(load<dtype>(x, start + i + 16 * j, 0xffff), rule, odd);
    _mm512_storeu_si512(out + i, bytes_of(q[0].index, q[1].index, q[2].index, q[3].index, _mm512_setzero_si512()));
    if (with_beyond) {
      const uint64_t mask = q[0].beyond | static_cast<uint64_t>(q[1].beyond) << 16 |
                            static_cast<uint64_t>(q[2].beyond) << 32 | static_cast<uint64_t>(q[3].beyond) << 48;
      _mm512_storeu_si512(beyond + i, _mm512_maskz_set1_epi8(mask, 1));
    }
  }
  for (; i < count; i += 16) {
    const int64_t some = count - i < 16 ? count - i : 16;
    const __mmask16 mask = static_cast<__mmask16>((1 << some) - 1);
    const Quantized q = quantize<with_beyond>(load<dtype>(x, start + i, mask), rule, odd);
    _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(q.index));
    if (with_beyond) _mm_mask_storeu_epi8(beyond + i, mask, _mm_maskz_set1_epi8(q.beyond, 1));
  }
  return odd;
}

// Four vectors, a lane a pixel, four channels a lane, to 16 channels a 128-bit lane: pixel 4 * lane + i in vector i.
void transpose(__m512i (&v)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

void store_block(__m512i (&v)[4], uint8_t* out, int64_t stride, int64_t pixels, int64_t channels) {
  transpose(v);
  const __mmask16 mask = static_cast<__mmask16>((1 << channels) - 1);
#define BE_STORE(i, lane)                                                                                   \
  if (4 * lane + i < pixels)                                                                                \
    _mm_mask_storeu_epi8(out + (4 * lane + i) * stride, mask, _mm512_extracti32x4_epi32(v[i], lane));
#define BE_STORE_LANE(lane) BE_STORE(0, lane) BE_STORE(1, lane) BE_STORE(2, lane) BE_STORE(3, lane)
  BE_STORE_LANE(0) BE_STORE_LANE(1) BE_STORE_LANE(2) BE_STORE_LANE(3)
#undef BE_STORE_LANE
#undef BE_STORE
}

// Pixels lie together in x, channels in out: blocks of 16 by 16 are transposed on the way.
template <Dtype dtype, bool with_beyond>
__mmask16 quantize_planes(const void* x, int64_t channel_stride, int64_t pixels, int64_t channels, const Rule& rule,
                          uint8_t* out, int64_t out_stride, uint8_t* beyond) {
  __mmask16 odd = 0;
  for (int64_t p = 0; p < pixels; p += 16) {
    const int64_t wide = pixels - p < 16 ? pixels - p : 16;
    const __mmask16 mask = static_cast<__mmask16>((1 << wide) - 1);
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t deep = channels - c < 16 ? channels - c : 16;
      __m512i codes[4], outside[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        codes[j] = outside[j] = _mm512_setzero_si512();
        for (int k = 0; k < 4 && 4 * j + k < deep; ++k) {
          const int64_t at = (c + 4 * j + k) * channel_stride + p;
          const Quantized q = quantize<with_beyond>(load<dtype>(x, at, mask), rule, odd);
          codes[j] = _mm512_or_si512(codes[j], _mm512_sll_epi32(q.index, _mm_cvtsi32_si128(8 * k)));
          if (with_beyond)
            outside[j] = _mm512_or_si512(outside[j], _mm512_maskz_set1_epi32(q.beyond, 1 << (8 * k)));
        }
      }
      store_block(codes, out + p * out_stride + c, out_stride, wide, deep);
      if (with_beyond) store_block(outside, beyond + p * out_stride + c, out_stride, wide, deep);
    }
  }
  return odd;
}

// The same where numbers are finite, as quantize_blocks: returns whether one was not.
template <Dtype dtype, bool sign>
bool quantize_plane_blocks(const void* x, int64_t channel_stride, int64_t pixels, int64_t channels, const Rule& rule,
                           uint8_t* out, int64_t out_stride) {
  // In each 128-bit lane, bytes of four channels by four pixels, turned.
  const __m512i turn = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  __m512 odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t p = 0; p < pixels; p += 16) {
    const int64_t wide = pixels - p < 16 ? pixels - p : 16;
    const __mmask16 mask = static_cast<__mmask16>((1 << wide) - 1);
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t deep = channels - c < 16 ? channels - c : 16;
      __m512i bytes[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512i code[4];
        bytes[j] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          code[k] = _mm512_setzero_si512();
          if (4 * j + k >= deep) continue;
          const __m512 value = load<dtype>(x, (c + 4 * j + k) * channel_stride + p, mask);
          const __m512 ratio = _mm512_mul_ps(value, rule.inverse);
          odd[k % 2] = _mm512_fmadd_ps(ratio, _mm512_setzero_ps(), odd[k % 2]);
          if (sign) {
            const __mmask16 positive = _mm512_cmp_ps_mask(ratio, _mm512_setzero_ps(), _CMP_GE_OQ);
            const __m512i one = _mm512_set1_epi32(1 << (8 * k + rule.shift));
            bytes[j] = _mm512_mask_or_epi32(bytes[j], positive, bytes[j], one);
          } else {
            code[k] = _mm512_cvtps_epi32(_mm512_min_ps(ratio, rule.high));
          }
        }
        if (sign) continue;
        const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(code[0], code[1]), rule.zero);
        const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(code[2], code[3]), rule.zero);
        bytes[j] = _mm512_shuffle_epi8(_mm512_packus_epi16(low, high), turn);
      }
      store_block(bytes, out + p * out_stride + c, out_stride, wide, deep);
    }
  }
  const __m512 any = _mm512_add_ps(odd[0], odd[1]);
  return _mm512_cmp_ps_mask(any, any, _CMP_UNORD_Q) != 0;
}

template <Dtype dtype, bool with_beyond>
bool quantize_all(const void* x, int64_t pixel_stride, int64_t channel_stride, int64_t pixels, int64_t channels,
                  const Rule& rule, uint8_t* out, int64_t out_stride, uint8_t* beyond) {
  if (channel_stride != 1) {
    const auto blocks = rule.sign ? quantize_plane_blocks<dtype, true> : quantize_plane_blocks<dtype, false>;
    if (!with_beyond && !blocks(x, channel_stride, pixels, channels, rule, out, out_stride)) return false;
    return quantize_planes<dtype, with_beyond>(x, channel_stride, pixels, channels, rule, out, out_stride, beyond);
  }
  if (pixel_stride == channels && out_stride == channels) {
    channels *= pixels;
    pixels = 1;
  }
  __mmask16 odd = 0;
  for (int64_t p = 0; p < pixels; ++p)
    odd |= quantize_run<dtype, with_beyond>(x, p * pixel_stride, channels, rule, out + p * out_stride,
                                            with_beyond ? beyond + p * out_stride : nullptr);
  return odd;
}

}  // namespace

bool quantize_activation_avx512(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride,
                                int64_t pixels, int64_t channels, ActivationRule rule, uint8_t* out,
                                int64_t out_stride, uint8_t* beyond) {
  if (channel_stride != 1 && pixel_stride != 1 && pixels > 1)
    return quantize_activation_scalar(x, dtype, pixel_stride, channel_stride, pixels, channels, rule, out, out_stride,
                                      beyond);
  const Rule r{_mm512_set1_ps(rule.inverse_scale), _mm512_set1_ps(rule.low),
               _mm512_set1_ps(static_cast<float>((1 << rule.bits) - 1)),
               _mm512_set1_ps(rule.low + static_cast<float>((1 << rule.bits) - 1)),
               _mm512_set1_epi16(static_cast<int16_t>(-rule.low)), rule.step == 2, rule.bits == 1};
#define BE_CALL(dtype, with)                                                                                          \
  quantize_all<dtype, with>(x, pixel_stride, channel_stride, pixels, channels, r, out, out_stride, beyond)
  switch (dtype) {
    case FLOAT32: return beyond ? BE_CALL(FLOAT32, true) : BE_CALL(FLOAT32, false);
    case BFLOAT16: return beyond ? BE_CALL(BFLOAT16, true) : BE_CALL(BFLOAT16, false);
    default: return beyond ? BE_CALL(FLOAT16, true) : BE_CALL(FLOAT16, false);
  }
#undef BE_CALL
}

}  // namespace bitorch_engine
