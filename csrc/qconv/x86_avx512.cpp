#include <immintrin.h>

#include <cstring>

#include "qconv/results.h"

namespace bitorch_engine {
namespace {

// MR pixels times NV blocks of 16 channels. The accumulators stay in registers only in a function that is nothing but
// this loop, with constant bounds: 24 of them, 4 vectors of weights, and one broadcast.
template <int MR, int NV>
void tile(const Tile& t, int64_t first) {
  __m512i acc[MR][NV];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[m][j] = _mm512_setzero_si512();
  const int64_t block = t.block_bytes;
  for (const Read *read = t.reads, *end = read + t.read_count; read < end; ++read) {
    const int8_t* weights = t.weights + read->weights;
    const uint8_t* pixel[MR];
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) pixel[m] = t.rows[first + m] + read->image;
    for (int64_t k = 0; k < t.depth; k += 4, weights += 64) {
      __m512i w[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) w[j] = _mm512_loadu_si512(weights + j * block);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        int four;
        __builtin_memcpy(&four, pixel[m] + k, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[m][j] = _mm512_dpbusd_epi32(acc[m][j], x, w[j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) _mm512_storeu_si512(t.totals + (first + m) * COLUMNS + j * BLOCK, acc[m][j]);
}

using TileFunction = void (*)(const Tile&, int64_t);
constexpr TileFunction TILES[6][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

// Of 16 channels, from o on, where totals begins.
__m512 value_of(const int32_t* totals, const Stretch& rows, const Epilogue& e, int64_t o, __mmask16 mask) {
  const __m512i zero = _mm512_maskz_loadu_epi32(mask, e.zero_sum + o);
  const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(totals), zero);
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_maskz_loadu_ps(mask, e.factor + o));
  if (rows.sample_factor) value = _mm512_mul_ps(value, _mm512_set1_ps(*rows.sample_factor));
  if (e.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, e.bias + o));
  return _mm512_add_ps(value, _mm512_set1_ps(e.poison));
}

__m256i bfloat16_of(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}

// rint(value) + zero, not yet within 0 .. 255. NaN becomes the least of all.
__m512i whole(__m512 value, __m512i zero) {
  return _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(1e6f), value)), zero);
}

__m128i bytes_of(__m512 value, const Epilogue& e) {
  const __m512i rounded = whole(value, _mm512_set1_epi32(e.zero));
  return _mm512_cvtusepi32_epi8(_mm512_max_epi32(rounded, _mm512_setzero_si512()));
}

__mmask16 first_lanes(int64_t count) { return count < 16 ? static_cast<__mmask16>((1 << count) - 1) : 0xffff; }

// To out[o] and the next 15 elements.
void store(__m512 value, const Epilogue& e, void* out, int64_t o, __mmask16 mask) {
  if (e.bytes)
    _mm_mask_storeu_epi8(static_cast<uint8_t*>(out) + o, mask, bytes_of(value, e));
  else if (e.dtype == FLOAT32)
    _mm512_mask_storeu_ps(static_cast<float*>(out) + o, mask, value);
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + o, mask,
                             e.dtype == BFLOAT16 ? bfloat16_of(value) : _mm512_cvtps_ph(value, 0));
}

// Rows of up to NV blocks of 16 channels, where channels are last: what is the same in every row stays in registers.
template <int NV>
void finish_rows(const int32_t* totals, const Stretch& rows, int64_t o, int64_t channels, const Epilogue& e) {
  __m512i zero[NV];
  __m512 factor[NV], added[NV];
  const __mmask16 last = first_lanes(channels - 16 * (NV - 1));
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const __mmask16 mask = j == NV - 1 ? last : 0xffff;
    zero[j] = _mm512_maskz_loadu_epi32(mask, e.zero_sum + o + 16 * j);
    factor[j] = _mm512_maskz_loadu_ps(mask, e.factor + o + 16 * j);
    added[j] = _mm512_set1_ps(e.poison);
    if (e.bias) added[j] = _mm512_add_ps(added[j], _mm512_maskz_loadu_ps(mask, e.bias + o + 16 * j));
  }
  if (!e.bytes && e.dtype == FLOAT32 && !rows.sample_factor) {
    for (int64_t i = 0; i < rows.count; ++i) {
      float* to = reinterpret_cast<float*>(rows.out + i * rows.step) + o;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(totals + i * COLUMNS + 16 * j), zero[j]);
        const __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), factor[j]), added[j]);
        if (j == NV - 1) _mm512_mask_storeu_ps(to + 16 * j, last, value);
        else _mm512_storeu_ps(to + 16 * j, value);
      }
    }
    return;
  }
  const bool four = NV == 4 && last == 0xffff && e.bytes;
  const __m512i byte_zero = _mm512_set1_epi32(e.zero);
  const __m512 sample = _mm512_set1_ps(rows.sample_factor ? *rows.sample_factor : 1.0f);
  for (int64_t i = 0; i < rows.count; ++i) {
    uint8_t* out = rows.out + i * rows.step;
    __m512 value[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(totals + i * COLUMNS + 16 * j), zero[j]);
      value[j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), factor[j]), sample);
      value[j] = _mm512_add_ps(value[j], added[j]);
    }
    if (four) {
      // Narrowing with saturation takes groups of four by turns from both operands.
      const __m512i low = _mm512_packs_epi32(whole(value[0], byte_zero), whole(value[1 % NV], byte_zero));
      const __m512i high = _mm512_packs_epi32(whole(value[2 % NV], byte_zero), whole(value[3 % NV], byte_zero));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm512_storeu_si512(out + o, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(value[j], e, out, o + 16 * j, j == NV - 1 ? last : 0xffff);
  }
}

// 16 rows of 16 to 16 columns of 16, in four rounds of interleaving.
void transpose(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace

void multiply_avx512(const Tile& t) {
  for (int64_t i = 0; i < t.count; i += 6) TILES[(t.count - i < 6 ? t.count - i : 6) - 1][t.blocks - 1](t, i);
  if (t.results) t.results->take(t.totals, 0, t.count, 0, t.blocks * BLOCK);
}

// 64 values are 8 * bits bytes. Each group of eight goes to a 64-bit lane, where every byte picks its own eight bits.
void decode_avx512(const uint8_t* packed, int64_t count, int bits, int8_t* codes) {
  if (bits == 1) {  // bits are a mask
    const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
    for (int64_t i = 0; i < count; i += 64, packed += 8) {
      uint64_t positive;
      std::memcpy(&positive, packed, sizeof positive);
      _mm512_storeu_si512(codes + i, _mm512_mask_blend_epi8(positive, minus, plus));
    }
    return;
  }
  alignas(64) uint8_t lanes[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    lanes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
    shifts[i] = static_cast<uint8_t>(i % 8 * bits);
  }
  const __m512i lane = _mm512_load_si512(lanes), shift = _mm512_load_si512(shifts);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(lowest_code(bits)));
  const __mmask64 present = (uint64_t{1} << (8 * bits)) - 1;
  for (int64_t i = 0; i < count; i += 64, packed += 8 * bits) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(present, packed);
    const __m512i wide = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(lane, bytes));
    _mm512_storeu_si512(codes + i, _mm512_add_epi8(_mm512_and_si512(wide, mask), low));
  }
}

void finish_avx512(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels, const Epilogue& e,
                   int64_t channel_stride) {
  const int64_t element = e.bytes ? 1 : e.dtype == FLOAT32 ? 4 : 2;
  if (channel_stride == 1) {
    using Rows = void (*)(const int32_t*, const Stretch&, int64_t, int64_t, const Epilogue&);
    constexpr Rows ROWS_OF[4] = {finish_rows<1>, finish_rows<2>, finish_rows<3>, finish_rows<4>};
    return ROWS_OF[(channels - 1) / 16](totals, rows, first, channels, e);
  }
  for (int64_t o = first; o < first + channels; o += 16, totals += 16) {
    const int64_t some = first + channels - o < 16 ? first + channels - o : 16;
    const int64_t together = rows.step == element ? 16 : 1;  // rows that follow each other in memory
    for (int64_t i = 0; i < rows.count; i += together) {
      uint8_t* to = rows.out + i * rows.step;
      const int64_t run = rows.count - i < together ? rows.count - i : together;
      if (run == 1) {
        alignas(64) uint8_t values[64];
        store(value_of(totals + i * COLUMNS, rows, e, o, first_lanes(some)), e, values, 0, 0xffff);
        for (int64_t c = 0; c < some; ++c)
          std::memcpy(to + (o + c) * channel_stride * element, values + c * element, element);
        continue;
      }
      __m512 r[16];
      for (int64_t q = 0; q < 16; ++q)
        r[q] = q < run ? value_of(totals + (i + q) * COLUMNS, rows, e, o, first_lanes(some)) : _mm512_setzero_ps();
      transpose(r);
      for (int64_t c = 0; c < some; ++c) store(r[c], e, to, (o + c) * channel_stride, first_lanes(run));
    }
  }
}

// 64 channels are `taps` vectors. Byte c of a tap lies in vector (c * taps + tap) / 64: one masked permutation each.
void split_avx512(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out) {
  constexpr int64_t MOST = 32;
  if (taps > MOST || channels < 16) return split_scalar(rows, count, channels, taps, out);
  uint64_t within[MOST][MOST] = {};
  alignas(64) uint8_t first_lane[64];
  for (int64_t c = 0; c < 64; ++c) first_lane[c] = static_cast<uint8_t>(c * taps % 64);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < 64; ++c) within[t][(c * taps + t) / 64] |= uint64_t{1} << c;
  const auto lanes = [](int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; };
  for (int64_t row = 0; row < count; ++row, rows += channels * taps, out += channels * taps)
    for (int64_t c = 0; c < channels; c += 64) {
      __m512i from[MOST];
      const int64_t left = channels - c, vectors = left < 64 ? (left * taps + 63) / 64 : taps;
      for (int64_t v = 0; v < vectors; ++v)
        from[v] = _mm512_maskz_loadu_epi8(lanes(left * taps - 64 * v), rows + c * taps + 64 * v);
      for (int64_t t = 0; t < taps; ++t) {
        const __m512i lane = _mm512_add_epi8(_mm512_load_si512(first_lane), _mm512_set1_epi8(static_cast<char>(t)));
        __m512i to = _mm512_setzero_si512();
        for (int64_t v = 0; v < vectors; ++v) to = _mm512_mask_permutexvar_epi8(to, within[t][v], lane, from[v]);
        _mm512_mask_storeu_epi8(out + t * channels + c, lanes(left), to);
      }
    }
}

}  // namespace bitorch_engine
