#include <immintrin.h>

#include <cstring>

#include "binary/binary.h"
#include "qconv/product.h"

namespace bitorch_engine {
namespace binary {
namespace {

// The number of ones in each byte: that of both halves, looked up.
__m256i ones_in_bytes(__m256i x) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i half = _mm256_set1_epi8(15);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(x, half));
  return _mm256_add_epi8(low, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), half)));
}

// MR pixels times half a block. Ones are counted in bytes; each takes 8 a word, so after 31 words they are widened.
template <int MR>
void tile(const Tile& t, int64_t first, const uint32_t* lanes, __m256i (&differing)[MR]) {
  constexpr int64_t LONGEST = 31;
  const __m256i one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1);
  __m256i bytes[MR];
#pragma GCC unroll 3
  for (int m = 0; m < MR; ++m) differing[m] = bytes[m] = _mm256_setzero_si256();
  int64_t left = LONGEST;
  for (const Segment *s = t.segments, *end = s + t.segment_count; s < end; ++s) {
    const uint32_t* weights = lanes + s->weights * LANES;
    const uint32_t* pixel[MR];
#pragma GCC unroll 3
    for (int m = 0; m < MR; ++m) pixel[m] = t.image + s->image + (first + m) * t.image_step;
    for (int64_t k = 0; k < s->words;) {
      const int64_t stop = s->words - k < left ? s->words : k + left;
      left -= stop - k;
      for (; k < stop; ++k, weights += LANES) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
#pragma GCC unroll 3
        for (int m = 0; m < MR; ++m) {
          const __m256i x = _mm256_set1_epi32(static_cast<int>(pixel[m][k]));
          bytes[m] = _mm256_add_epi8(bytes[m], ones_in_bytes(_mm256_xor_si256(w, x)));
        }
      }
      if (left > 0) continue;
      left = LONGEST;
#pragma GCC unroll 3
      for (int m = 0; m < MR; ++m) {
        const __m256i wide = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes[m], one8), one16);
        differing[m] = _mm256_add_epi32(differing[m], wide);
        bytes[m] = _mm256_setzero_si256();
      }
    }
  }
#pragma GCC unroll 3
  for (int m = 0; m < MR; ++m) {
    const __m256i wide = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes[m], one8), one16);
    differing[m] = _mm256_add_epi32(differing[m], wide);
  }
}

template <int MR>
void tile_and_store(const Tile& t, int64_t first) {
  for (int64_t o = 0; o < t.blocks * LANES; o += 8) {
    __m256i differing[MR];
    tile<MR>(t, first, t.weights + o / LANES * t.block_words + o % LANES, differing);
    for (int m = 0; m < MR; ++m) {
      const __m256i total =
          _mm256_sub_epi32(_mm256_set1_epi32(t.products), _mm256_add_epi32(differing[m], differing[m]));
      if (t.totals) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.totals + (first + m) * COLUMNS + o), total);
      } else {
        __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_loadu_ps(t.factor + o));
        if (t.added) value = _mm256_add_ps(value, _mm256_loadu_ps(t.added + o));
        _mm256_storeu_ps(t.out + (first + m) * t.out_step + o, value);
      }
    }
  }
}

template <Dtype dtype>
__m256 load(const void* x, int64_t i) {
  if (dtype == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// x * inverse is negative where x <= this, the smallest of negative numbers whose product is not rounded to 0, which
// counts as +1: a comparison takes the place of a product and one.
float least_negative(float inverse) {
  const auto negative = [](uint32_t size) {
    const uint32_t bits = size | 0x80000000;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  uint32_t size = 1, beyond = 0x7f800000;  // infinity
  if (negative(size) * inverse < 0) return negative(size);
  while (beyond - size > 1) {
    const uint32_t middle = size + (beyond - size) / 2;
    (negative(middle) * inverse < 0 ? beyond : size) = middle;
  }
  return negative(beyond);
}

// The signs of 32 values; `odd` becomes NaN where one is not finite.
template <Dtype dtype>
uint32_t signs_of(const void* x, int64_t i, __m256 negative, __m256 (&odd)[4]) {
  __m256i positive[4];  // -1, or 0
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256 value = load<dtype>(x, i + 8 * j);
    odd[j] = _mm256_fmadd_ps(value, _mm256_setzero_ps(), odd[j]);
    positive[j] = _mm256_castps_si256(_mm256_cmp_ps(negative, value, _CMP_NGE_UQ));
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(positive[0], positive[1]),
                                           _mm256_packs_epi32(positive[2], positive[3]));
  const __m256i in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return static_cast<uint32_t>(_mm256_movemask_epi8(in_order));
}

template <Dtype dtype>
bool sign_runs(const Floats& f, uint32_t* out, int64_t out_stride) {
  const __m256 negative = _mm256_set1_ps(least_negative(f.inverse_scale));
  const int64_t whole = f.channels & ~(WORD - 1);
  __m256 odd[4] = {};
  for (int64_t p = 0; p < f.pixels; ++p)
    for (int64_t c = 0; c < whole; c += WORD)
      out[p * out_stride + c / WORD] = signs_of<dtype>(f.x, p * f.pixel_stride + c, negative, odd);
  const __m256 all = _mm256_add_ps(_mm256_add_ps(odd[0], odd[1]), _mm256_add_ps(odd[2], odd[3]));
  bool seen = _mm256_movemask_ps(_mm256_cmp_ps(all, all, _CMP_UNORD_Q)) != 0;
  if (whole < f.channels) {
    Floats rest = f;
    rest.x = static_cast<const uint8_t*>(f.x) + whole * (dtype == FLOAT32 ? 4 : 2);
    rest.channels -= whole;
    seen |= sign_scalar(rest, out + whole / WORD, out_stride);
  }
  return seen;
}

// The signs of COUNT channels, `channel` the first of them, of `pixels` pixels that lie together: each lane of `words`
// is a pixel, whose bits move up for them. Few channels at a time are few streams, which the processor fetches ahead.
template <Dtype dtype, int COUNT>
void add_signs(const Floats& f, int64_t channel, int64_t pixel, int64_t pixels, __m256 negative, uint32_t* words,
               __m256& odd) {
  for (int64_t p = 0; p < pixels; p += 8) {
    __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + p));
#pragma GCC unroll 4
    for (int i = COUNT - 1; i >= 0; --i) {
      const __m256 x = load<dtype>(f.x, (channel + i) * f.channel_stride + pixel + p);
      odd = _mm256_fmadd_ps(x, _mm256_setzero_ps(), odd);
      const __m256 positive = _mm256_cmp_ps(negative, x, _CMP_NGE_UQ);  // -1, or 0
      bits = _mm256_sub_epi32(_mm256_add_epi32(bits, bits), _mm256_castps_si256(positive));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(words + p), bits);
  }
}

// Pixels lie together.
template <Dtype dtype>
bool sign_planes(const Floats& f, uint32_t* out, int64_t out_stride) {
  constexpr int64_t AT_ONCE = 1024;
  alignas(32) uint32_t words[AT_ONCE];
  const int64_t whole = f.pixels & ~int64_t{7};
  const __m256 negative = _mm256_set1_ps(least_negative(f.inverse_scale));
  __m256 odd = _mm256_setzero_ps();
  for (int64_t p = 0; p < whole; p += AT_ONCE)
    for (int64_t c = 0; c < f.channels; c += WORD) {
      const int64_t some = whole - p < AT_ONCE ? whole - p : AT_ONCE;
      int64_t deep = f.channels - c < WORD ? f.channels - c : WORD;
      std::memset(words, 0, some * sizeof *words);
      for (; deep % 4; --deep) add_signs<dtype, 1>(f, c + deep - 1, p, some, negative, words, odd);
      for (; deep; deep -= 4) add_signs<dtype, 4>(f, c + deep - 4, p, some, negative, words, odd);
      for (int64_t i = 0; i < some; ++i) out[(p + i) * out_stride + c / WORD] = words[i];
    }
  bool seen = _mm256_movemask_ps(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)) != 0;
  if (whole < f.pixels) {
    Floats rest = f;
    rest.x = static_cast<const uint8_t*>(f.x) + whole * (dtype == FLOAT32 ? 4 : 2);
    rest.pixels -= whole;
    seen |= sign_scalar(rest, out + whole * out_stride, out_stride);
  }
  return seen;
}

}  // namespace

void multiply_avx2(const Tile& t) {
  // 4 pixels are 3 + 1 or 2 + 2: the halves.
  const int64_t half = t.count / 2;
  switch (t.count) {
    case 1: return tile_and_store<1>(t, 0);
    case 2: return tile_and_store<2>(t, 0);
    case 3: return tile_and_store<3>(t, 0);
    case 4: tile_and_store<2>(t, 0); return tile_and_store<2>(t, half);
    case 5: tile_and_store<2>(t, 0); return tile_and_store<3>(t, half);
    default: tile_and_store<3>(t, 0); return tile_and_store<3>(t, half);
  }
}

bool sign_avx2(const Floats& f, uint32_t* out, int64_t out_stride) {
  const bool runs_or_planes = f.channel_stride == 1 || f.pixel_stride == 1;
  if (!runs_or_planes || !(f.inverse_scale > 0)) return sign_scalar(f, out, out_stride);
#define BE_CALL(dtype) \
  (f.channel_stride == 1 ? sign_runs<dtype>(f, out, out_stride) : sign_planes<dtype>(f, out, out_stride))
  switch (f.dtype) {
    case FLOAT32: return BE_CALL(FLOAT32);
    case BFLOAT16: return BE_CALL(BFLOAT16);
    default: return BE_CALL(FLOAT16);
  }
#undef BE_CALL
}

// A lane takes up to 25 bits of one channel, wherever in a byte they begin. Shifted to the top, one tap of 8 channels
// is the signs of the lanes.
void arrange_avx2(const uint8_t* row, int first, int64_t channels, int64_t taps, uint32_t* out) {
  constexpr int64_t DEEPEST = 25;
  const int64_t words = (channels + WORD - 1) / WORD;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i apart = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(taps)));
  for (int64_t c = 0; c < words * WORD; c += 8) {
    const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(channels - c)), lane);
    for (int64_t t = 0; t < taps; t += DEEPEST) {
      const int64_t start = first + c * taps + t;
      const __m256i bit = _mm256_add_epi32(apart, _mm256_set1_epi32(static_cast<int>(start & 7)));
      const int* from = reinterpret_cast<const int*>(row + (start >> 3));
      const __m256i bytes =
          _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), from, _mm256_srli_epi32(bit, 3), present, 1);
      const int64_t deep = taps - t < DEEPEST ? taps - t : DEEPEST;
      __m256i taken = _mm256_srlv_epi32(bytes, _mm256_and_si256(bit, _mm256_set1_epi32(7)));
      taken = _mm256_sll_epi32(taken, _mm_cvtsi32_si128(static_cast<int>(32 - deep)));
      // The last tap is at the top now: from it to the first.
      for (int64_t i = t + deep - 1; i >= t; --i, taken = _mm256_add_epi32(taken, taken)) {
        uint8_t* to = reinterpret_cast<uint8_t*>(out + (i * words + c / WORD) * LANES) + c % WORD / 8;
        *to = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(taken)));
      }
    }
  }
}

}  // namespace binary
}  // namespace bitorch_engine
