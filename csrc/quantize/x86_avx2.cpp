#include <immintrin.h>

#include <cstring>

#include "quantize/quantize.h"
#include "runtime/transpose.h"

namespace bitorch_engine {
namespace {

struct Rule {
  __m256 inverse, low, high;  // the lowest and the highest code
  __m256i zero, largest;      // added to a code to get the index; the largest index, in bytes
  __m256i step;               // 1 bit: what the index 1 is written as
};

template <Dtype dtype>
__m256 load(const void* x, int64_t i) {
  if (dtype == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// What has to be done again by the scalar kernel: infinities and NaN make `odd` NaN, or, where values are rounded
// before they are clamped, they, numbers beyond 32 bits, and codes below those of 16 make `least` the least integer.
struct Odd {
  __m256 odd = _mm256_setzero_ps();
  __m256i least = _mm256_setzero_si256();  // 16 bits each

  bool any() const {
    const __m256i lowest = _mm256_cmpeq_epi16(least, _mm256_set1_epi16(INT16_MIN));
    return _mm256_movemask_ps(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)) != 0 || _mm256_movemask_epi8(lowest) != 0;
  }
};

template <bool sign, bool with_beyond>
__m256i quantize(__m256 x, const Rule& rule, Odd& seen, __m256i& beyond) {
  const __m256 ratio = _mm256_mul_ps(x, rule.inverse);
  if (!sign && !with_beyond) return _mm256_cvtps_epi32(ratio);  // bytes_of clamps
  seen.odd = _mm256_fmadd_ps(ratio, _mm256_setzero_ps(), seen.odd);
  if (sign) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), ratio);
    if (with_beyond) beyond = _mm256_castps_si256(_mm256_cmp_ps(size, _mm256_set1_ps(1), _CMP_GT_OQ));
    return _mm256_castps_si256(_mm256_cmp_ps(ratio, _mm256_setzero_ps(), _CMP_GE_OQ));
  }
  const __m256i code = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ratio, rule.low), rule.high));
  if (with_beyond) {
    const __m256 value = _mm256_cvtepi32_ps(code);
    const __m256 below = _mm256_cmp_ps(ratio, rule.low, _CMP_LT_OQ), above = _mm256_cmp_ps(ratio, value, _CMP_GT_OQ);
    const __m256 lowest = _mm256_cmp_ps(value, rule.low, _CMP_EQ_OQ);
    beyond = _mm256_castps_si256(_mm256_blendv_ps(above, below, lowest));
  }
  return code;
}

// Packing works within 128-bit lanes; `order` repairs it.
__m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Packing saturates, so that what is below the lowest code has the index 0, and what is above all has 255 or less.
template <bool sign>
__m256i bytes_of(const __m256i (&code)[4], const Rule& rule, Odd& seen) {
  const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
  if (sign) return _mm256_and_si256(in_order(_mm256_packs_epi16(low, high)), rule.step);
  seen.least = _mm256_min_epi16(seen.least, _mm256_min_epi16(low, high));
  const __m256i index = _mm256_packus_epi16(_mm256_adds_epi16(low, rule.zero), _mm256_adds_epi16(high, rule.zero));
  return in_order(_mm256_min_epu8(index, rule.largest));
}

// 32 values at a time. Returns whether one was odd: then all are to be done again.
template <Dtype dtype, bool sign, bool with_beyond>
bool quantize_blocks(const void* x, int64_t start, int64_t count, const Rule& rule, uint8_t* out, uint8_t* beyond) {
  Odd odd;
  for (int64_t i = 0; i < count; i += 32) {
    __m256i code[4], outside[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      code[j] = quantize<sign, with_beyond>(load<dtype>(x, start + i + 8 * j), rule, odd, outside[j]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes_of<sign>(code, rule, odd));
    if (with_beyond) {
      const __m256i low = _mm256_packs_epi32(outside[0], outside[1]), high = _mm256_packs_epi32(outside[2], outside[3]);
      const __m256i mask = in_order(_mm256_packs_epi16(low, high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(beyond + i), _mm256_and_si256(mask, _mm256_set1_epi8(1)));
    }
  }
  return odd.any();
}

using Blocks = bool (*)(const void*, int64_t, int64_t, const Rule&, uint8_t*, uint8_t*);

template <Dtype dtype>
Blocks blocks_for(bool sign, bool with_beyond) {
  if (sign) return with_beyond ? quantize_blocks<dtype, true, true> : quantize_blocks<dtype, true, false>;
  return with_beyond ? quantize_blocks<dtype, false, true> : quantize_blocks<dtype, false, false>;
}

// A run of values that lie together, in x and in out.
struct Run {
  Dtype dtype;
  ActivationRule rule;
  Rule vectors;
  Blocks blocks;

  Run(Dtype dtype, const ActivationRule& rule, bool with_beyond)
      : dtype(dtype),
        rule(rule),
        vectors{_mm256_set1_ps(rule.inverse_scale), _mm256_set1_ps(rule.low),
                _mm256_set1_ps(rule.low + static_cast<float>((1 << rule.bits) - 1)),
                _mm256_set1_epi16(static_cast<int16_t>(-rule.low)),
                _mm256_set1_epi8(static_cast<char>((1 << rule.bits) - 1)),
                _mm256_set1_epi8(static_cast<char>(rule.step))},
        blocks(dtype == FLOAT32    ? blocks_for<FLOAT32>(rule.bits == 1, with_beyond)
               : dtype == BFLOAT16 ? blocks_for<BFLOAT16>(rule.bits == 1, with_beyond)
                                   : blocks_for<FLOAT16>(rule.bits == 1, with_beyond)) {}

  bool operator()(const void* x, int64_t start, int64_t count, uint8_t* out, uint8_t* beyond) const {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, whole = count & ~int64_t{31};
    bool odd = blocks(x, start, whole, vectors, out, beyond);
    if (whole < count && whole > 0) {  // the last block begins earlier, and does some again
      const int64_t last = count - 32;
      odd |= blocks(x, start + last, 32, vectors, out + last, beyond ? beyond + last : nullptr);
    } else if (whole < count) {
      alignas(32) uint8_t values[32 * 4] = {}, codes[32], outside[32];
      std::memcpy(values, static_cast<const uint8_t*>(x) + start * size, count * size);
      odd |= blocks(values, 0, 32, vectors, codes, outside);
      std::memcpy(out, codes, count);
      if (beyond) std::memcpy(beyond, outside, count);
    }
    if (!odd) return false;
    const uint8_t* first = static_cast<const uint8_t*>(x) + start * size;
    return quantize_activation_scalar(first, dtype, count, 1, 1, count, rule, out, count, beyond);
  }
};

// 16 lines of pixels, `stride` bytes apart, to pixels of `deep` of 16 channels.
void turn(const uint8_t* lines, int64_t stride, int64_t pixels, int64_t deep, uint8_t* out, int64_t out_stride) {
  for (int64_t p = 0; p < pixels; p += 16) {
    const int64_t some = pixels - p < 16 ? pixels - p : 16;
    if (deep == 16) {
      transpose_16_bytes(lines + p, stride, out + p * out_stride, out_stride, static_cast<int>(some));
      continue;
    }
    uint8_t turned[16 * 16];
    transpose_16_bytes(lines + p, stride, turned, 16);
    for (int64_t i = 0; i < some; ++i) std::memcpy(out + (p + i) * out_stride, turned + 16 * i, deep);
  }
}

// Pixels lie together in x, channels in out: 16 lines of pixels become bytes, which are turned.
bool quantize_planes(const Run& run, const void* x, int64_t channel_stride, int64_t pixels, int64_t channels,
                     uint8_t* out, int64_t out_stride, uint8_t* beyond) {
  constexpr int64_t PIXELS = 128;
  alignas(32) uint8_t codes[16 * PIXELS] = {}, outside[16 * PIXELS] = {};
  bool odd = false;
  for (int64_t p = 0; p < pixels; p += PIXELS) {
    const int64_t wide = pixels - p < PIXELS ? pixels - p : PIXELS;
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t deep = channels - c < 16 ? channels - c : 16, to = p * out_stride + c;
      for (int64_t k = 0; k < deep; ++k)
        odd |= run(x, (c + k) * channel_stride + p, wide, codes + k * PIXELS, beyond ? outside + k * PIXELS : nullptr);
      turn(codes, PIXELS, wide, deep, out + to, out_stride);
      if (beyond) turn(outside, PIXELS, wide, deep, beyond + to, out_stride);
    }
  }
  return odd;
}

}  // namespace

bool quantize_activation_avx2(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride, int64_t pixels,
                              int64_t channels, ActivationRule rule, uint8_t* out, int64_t out_stride,
                              uint8_t* beyond) {
  if (channel_stride != 1 && pixel_stride != 1 && pixels > 1)
    return quantize_activation_scalar(x, dtype, pixel_stride, channel_stride, pixels, channels, rule, out, out_stride,
                                      beyond);
  const Run run(dtype, rule, beyond != nullptr);
  if (channel_stride != 1) return quantize_planes(run, x, channel_stride, pixels, channels, out, out_stride, beyond);
  if (pixel_stride == channels && out_stride == channels) {
    channels *= pixels;
    pixels = 1;
  }
  bool odd = false;
  for (int64_t p = 0; p < pixels; ++p)
    odd |= run(x, p * pixel_stride, channels, out + p * out_stride, beyond ? beyond + p * out_stride : nullptr);
  return odd;
}

void floats_avx2(const uint8_t* index, int64_t count, int bits, float lowest, float factor, float* out) {
  const __m256 steps = _mm256_set1_ps(bits == 1 ? 2.0f : 1.0f), lows = _mm256_set1_ps(lowest);
  const __m256 factors = _mm256_set1_ps(factor);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(index + i));
    const __m256 codes = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), steps, lows);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(codes, factors));
  }
  floats_scalar(index + i, count - i, bits, lowest, factor, out + i);
}

}  // namespace bitorch_engine
