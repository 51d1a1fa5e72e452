#include <arm_neon.h>

#include "binary/binary.h"
#include "qconv/product.h"

namespace bitorch_engine {
namespace binary {
namespace {

// MR pixels times one block. Ones are counted in bytes; each takes 8 a word, so after 31 words they are widened.
template <int MR>
void tile(const Tile& t, int64_t first, int64_t block) {
  constexpr int64_t LONGEST = 31;
  uint32x4_t differing[MR][4];
  uint8x16_t bytes[MR][4];
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      differing[m][j] = vdupq_n_u32(0);
      bytes[m][j] = vdupq_n_u8(0);
    }
  int64_t left = LONGEST;
  for (const Segment *s = t.segments, *end = s + t.segment_count; s < end; ++s) {
    const uint32_t* weights = t.weights + block * t.block_words + s->weights * LANES;
    const uint32_t* pixel = t.image + s->image + first * t.image_step;
    for (int64_t k = 0; k < s->words;) {
      const int64_t stop = s->words - k < left ? s->words : k + left;
      left -= stop - k;
      for (; k < stop; ++k, weights += LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const uint32x4_t w = vld1q_u32(weights + 4 * j);
#pragma GCC unroll 2
          for (int m = 0; m < MR; ++m) {
            const uint32x4_t x = veorq_u32(w, vdupq_n_u32(pixel[m * t.image_step + k]));
            bytes[m][j] = vaddq_u8(bytes[m][j], vcntq_u8(vreinterpretq_u8_u32(x)));
          }
        }
      }
      if (left > 0) continue;
      left = LONGEST;
#pragma GCC unroll 2
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          differing[m][j] = vpadalq_u16(differing[m][j], vpaddlq_u8(bytes[m][j]));
          bytes[m][j] = vdupq_n_u8(0);
        }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t o = block * LANES + 4 * j, pixel = first + m;
      const int32x4_t ones = vreinterpretq_s32_u32(vpadalq_u16(differing[m][j], vpaddlq_u8(bytes[m][j])));
      const int32x4_t total = vsubq_s32(vdupq_n_s32(t.products), vaddq_s32(ones, ones));
      if (t.totals) {
        vst1q_s32(t.totals + pixel * COLUMNS + o, total);
      } else {
        float32x4_t value = vmulq_f32(vcvtq_f32_s32(total), vld1q_f32(t.factor + o));
        if (t.added) value = vaddq_f32(value, vld1q_f32(t.added + o));
        vst1q_f32(t.out + pixel * t.out_step + o, value);
      }
    }
}

// Four signs as the values 1, 2, 4 and 8 of four lanes, added; `odd` becomes NaN where a value is not finite.
uint32_t signs_of(float32x4_t x, float inverse_scale, float32x4_t& odd) {
  const uint32_t weights[4] = {1, 2, 4, 8};
  odd = vaddq_f32(odd, vmulq_n_f32(x, 0));
  const uint32x4_t negative = vcltq_f32(vmulq_n_f32(x, inverse_scale), vdupq_n_f32(0));
  return vaddvq_u32(vbicq_u32(vld1q_u32(weights), negative));
}

}  // namespace

void multiply_neon(const Tile& t) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    int64_t i = 0;
    for (; i + 2 <= t.count; i += 2) tile<2>(t, i, b);
    if (i < t.count) tile<1>(t, i, b);
  }
}

bool sign_neon(const Floats& f, uint32_t* out, int64_t out_stride) {
  if (f.channel_stride != 1 || f.dtype != FLOAT32) return sign_scalar(f, out, out_stride);
  const int64_t whole = f.channels & ~(WORD - 1);
  float32x4_t odd = vdupq_n_f32(0);
  for (int64_t p = 0; p < f.pixels; ++p)
    for (int64_t c = 0; c < whole; c += WORD) {
      const float* x = static_cast<const float*>(f.x) + p * f.pixel_stride + c;
      uint32_t word = 0;
      for (int j = 0; j < 8; ++j) word |= signs_of(vld1q_f32(x + 4 * j), f.inverse_scale, odd) << (4 * j);
      out[p * out_stride + c / WORD] = word;
    }
  bool seen = vminvq_u32(vceqq_f32(odd, odd)) == 0;
  if (whole < f.channels) {
    Floats rest = f;
    rest.x = static_cast<const float*>(f.x) + whole;
    rest.channels -= whole;
    seen |= sign_scalar(rest, out + whole / WORD, out_stride);
  }
  return seen;
}

}  // namespace binary
}  // namespace bitorch_engine
