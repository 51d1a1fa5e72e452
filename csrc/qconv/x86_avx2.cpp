#include <immintrin.h>

#include <cstring>

#include "bits/bits.h"
#include "bits/halves.h"
#include "qconv/results.h"
#include "runtime/transpose.h"

namespace bitorch_engine {
namespace {

constexpr int64_t PIXELS = 4;  // of a tile

// MR pixels times a block of 16 channels, one step: sum += four products of each.
template <int MR>
__attribute__((always_inline)) inline void step(const uint8_t* const (&pixel)[MR], int64_t k, const int8_t* weights,
                                                bool first, __m256i (&sum)[MR][2]) {
  const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32));
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    int four;
    __builtin_memcpy(&four, pixel[m] + k, 4);
    const __m256i x = _mm256_set1_epi32(four);
    const __m256i a = _mm256_maddubs_epi16(x, left), b = _mm256_maddubs_epi16(x, right);
    sum[m][0] = first ? a : _mm256_add_epi16(sum[m][0], a);
    sum[m][1] = first ? b : _mm256_add_epi16(sum[m][1], b);
    // Or else the compiler multiplies all first and adds later, and spills every product.
    __asm__ volatile("" : "+x"(sum[m][0]), "+x"(sum[m][1]));
  }
}

// totals += unit * sum
template <int MR>
__attribute__((always_inline)) inline void widen(const __m256i (&sum)[MR][2], __m256i unit, int32_t* totals) {
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m256i* total = reinterpret_cast<__m256i*>(totals + m * COLUMNS + 8 * j);
      _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), _mm256_madd_epi16(sum[m][j], unit)));
    }
}

// vpmaddubsw adds two products in 16 bits; STEPS such sums fit there before they are widened. Eight 16-bit sums, two
// vectors of weights and a pixel are in registers; the totals are in the L1 cache, touched once in STEPS steps, and
// once in the rest of a read.
template <int MR, int STEPS>
void tile(const Tile& t, int64_t first, const int8_t* block, int unit, int32_t* totals) {
  const __m256i units = _mm256_set1_epi16(static_cast<int16_t>(unit));
  // Copies: for all GCC knows, a store of totals changes the tile.
  const int64_t depth = t.depth;
  const uint8_t* const* const rows = t.rows + first;
  for (const Read *read = t.reads, *end = read + t.read_count; read < end; ++read) {
    const int8_t* weights = block + read->weights;
    const uint8_t* pixel[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) pixel[m] = rows[m] + read->image;
    int64_t k = 0;
    __m256i sum[MR][2];
    for (; k + 4 * STEPS <= depth; k += 4 * STEPS, weights += 64 * STEPS) {
#pragma GCC unroll 16
      for (int g = 0; g < STEPS; ++g) step<MR>(pixel, k + 4 * g, weights + 64 * g, g == 0, sum);
      widen<MR>(sum, units, totals);
    }
    if (k == depth) continue;
    step<MR>(pixel, k, weights, true, sum);
    for (k += 4, weights += 64; k < depth; k += 4, weights += 64) step<MR>(pixel, k, weights, false, sum);
    widen<MR>(sum, units, totals);
  }
}

using TileFunction = void (*)(const Tile&, int64_t, const int8_t*, int, int32_t*);
template <int STEPS>
constexpr TileFunction TILES[PIXELS] = {tile<1, STEPS>, tile<2, STEPS>, tile<3, STEPS>, tile<4, STEPS>};

const TileFunction* tiles_for(int64_t pairs) {
  return pairs >= 16 ? TILES<16> : pairs >= 8 ? TILES<8> : pairs >= 4 ? TILES<4> : TILES<2>;
}

// All pixels times one block.
void multiply_block(const Tile& t, const TileFunction* tiles, const int8_t* weights, int unit, int32_t* totals) {
  for (int64_t i = 0; i < t.count; i += PIXELS)
    tiles[(t.count - i < PIXELS ? t.count - i : PIXELS) - 1](t, i, weights, unit, totals + i * COLUMNS);
}

// Where not two sums fit, each weight is taken as 16 * high + low, with -8 <= high <= 8 and -8 <= low <= 7: two
// products of eight sums each. The halves are made for SOME products of a read and all pixels at a time.
void multiply_halves(const Tile& whole, const int8_t* block, int32_t* totals) {
  constexpr int64_t SOME = 256;
  alignas(32) int8_t high[SOME * BLOCK], low[SOME * BLOCK];
  Read some{0, 0};
  Tile t = whole;
  t.reads = &some;
  t.read_count = 1;
  for (const Read* read = whole.reads; read < whole.reads + whole.read_count; ++read)
    for (int64_t k = 0; k < whole.depth; k += SOME) {
      const int8_t* weights = block + read->weights + k * BLOCK;
      some.image = read->image + k;
      t.depth = whole.depth - k < SOME ? whole.depth - k : SOME;
      for (int64_t i = 0; i < t.depth * BLOCK; i += 32, weights += 32) {
        // The high half of w + 8 without sign: bytes have no shift of their own.
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
        const __m256i shifted = _mm256_srli_epi16(_mm256_add_epi8(w, _mm256_set1_epi8(-120)), 4);  // w + 8 + 128
        // w + 136 does not fit a byte from 120 on: those have a high half of 8.
        const __m256i beyond = _mm256_and_si256(_mm256_cmpgt_epi8(w, _mm256_set1_epi8(119)), _mm256_set1_epi8(16));
        const __m256i part = _mm256_add_epi8(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), beyond);
        const __m256i h = _mm256_sub_epi8(part, _mm256_set1_epi8(8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(high + i), h);
        const __m256i sixteen = _mm256_slli_epi16(_mm256_and_si256(h, _mm256_set1_epi8(15)), 4);
        _mm256_store_si256(reinterpret_cast<__m256i*>(low + i), _mm256_sub_epi8(w, sixteen));
      }
      multiply_block(t, TILES<8>, high, 16, totals);
      multiply_block(t, TILES<8>, low, 1, totals);
    }
}

// The epilogue of eight channels: what is the same in every row stays in registers.
struct Channels {
  __m256i zero;
  __m256 factor, bias, poison;
  bool has_bias;

  Channels(const Epilogue& e, int64_t o)
      : zero(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.zero_sum + o))),
        factor(_mm256_loadu_ps(e.factor + o)),
        bias(e.bias ? _mm256_loadu_ps(e.bias + o) : _mm256_setzero_ps()),
        poison(_mm256_set1_ps(e.poison)),
        has_bias(e.bias != nullptr) {}

  __m256 value(const int32_t* totals, const float* sample_factor) const {
    const __m256i total = _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(totals)), zero);
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(total), factor);
    if (sample_factor) value = _mm256_mul_ps(value, _mm256_set1_ps(*sample_factor));
    if (has_bias) value = _mm256_add_ps(value, bias);
    return _mm256_add_ps(value, poison);
  }
};

__m128i narrow(__m256i words) {
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

__m128i bfloat16_of(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return narrow(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan));
}

// Eight numbers that follow each other.
void store(__m256 value, const Epilogue& e, uint8_t* out) {
  if (e.bytes) {
    // NaN becomes the least of all integers.
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(1e6f), value));
    const __m256i byte = _mm256_add_epi32(whole, _mm256_set1_epi32(e.zero));
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(byte), _mm256_extracti128_si256(byte, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(half, half));
  } else if (e.dtype == FLOAT32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out), value);
  } else {
    const __m128i half = e.dtype == BFLOAT16 ? bfloat16_of(value) : _mm256_cvtps_ph(value, 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half);
  }
}

// Eights of channels from `first` on, where channels are last: 64 of a pixel are 256 bytes in a row, which takes a
// third less time to write than 16 of one pixel after the other. e is a copy, which no store of results changes.
void finish_rows(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels, const Epilogue e) {
  const int64_t element = e.bytes ? 1 : e.dtype == FLOAT32 ? 4 : 2;
  const int64_t count = rows.count, step = rows.step;
  const float* const sample_factor = rows.sample_factor;
  uint8_t* to = rows.out + first * element;
  for (int64_t i = 0; i < count; ++i, to += step, totals += COLUMNS)
    for (int64_t o = 0; o < channels; o += 8)
      store(Channels(e, first + o).value(totals + o, sample_factor), e, to + o * element);
}

// Eight rows of eight to eight columns of eight.
void transpose(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Channels o .. o + 7 of all rows, each channel in a plane of its own, `plane` bytes apart: where rows follow each
// other in memory, eight are turned together. totals begins with channel o.
void finish_planes(const int32_t* totals, const Stretch& rows, int64_t o, const Epilogue& e, int64_t plane,
                   int64_t element) {
  const Channels channels(e, o);
  const auto value = [&](int64_t i) { return channels.value(totals + i * COLUMNS, rows.sample_factor); };
  uint8_t* to = rows.out + o * plane;
  int64_t i = 0;
  for (; rows.step == element && i + 8 <= rows.count; i += 8, to += 8 * element) {
    __m256 r[8];
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) r[q] = value(i + q);
    transpose(r);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) store(r[c], e, to + c * plane);
  }
  for (; i < rows.count; ++i, to += rows.step) {
    alignas(32) uint8_t values[32];
    store(value(i), e, values);
    for (int64_t c = 0; c < 8; ++c) std::memcpy(to + c * plane, values + c * element, element);
  }
}

}  // namespace

void multiply_avx2(const Tile& t) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    int32_t* totals = t.totals + b * BLOCK;
    for (int64_t i = 0; i < t.count; ++i) std::memset(totals + i * COLUMNS, 0, BLOCK * sizeof(int32_t));
    if (t.pairs >= 2) multiply_block(t, tiles_for(t.pairs), t.weights + b * t.block_bytes, 1, totals);
    else multiply_halves(t, t.weights + b * t.block_bytes, totals);
  }
  if (t.results) t.results->take(t.totals, 0, t.count, 0, t.blocks * BLOCK);
}

void decode_avx2(const uint8_t* packed, int64_t count, int bits, int8_t* codes) {
  const __m256i low = _mm256_set1_epi8(static_cast<char>(lowest_code(bits)));
  uint8_t* const to = reinterpret_cast<uint8_t*>(codes);
  const auto code = [low](__m256i index) { return _mm256_add_epi8(index, low); };
  const auto sign = [low](__m256i index) { return _mm256_add_epi8(_mm256_add_epi8(index, index), low); };
  if (bits == 4) unpack_vectors<4>(packed, to, count, code);
  if (bits == 2) unpack_vectors<2>(packed, to, count, code);
  if (bits == 1) unpack_vectors<1>(packed, to, count, sign);
  if (8 % bits == 0) return;
  constexpr int64_t SOME = 1024;  // values that stay in the L1 cache until the lowest code is added
  const auto unpack = unpack_kernel.pick();
  for (int64_t i = 0; i < count; i += SOME, packed += SOME / 8 * bits) {
    unpack(packed, to + i, SOME, bits);
    for (int64_t j = i; j < i + SOME; j += 32) {
      __m256i* place = reinterpret_cast<__m256i*>(to + j);
      _mm256_storeu_si256(place, code(_mm256_loadu_si256(place)));
    }
  }
}

void finish_avx2(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels, const Epilogue& e,
                 int64_t channel_stride) {
  const int64_t element = e.bytes ? 1 : e.dtype == FLOAT32 ? 4 : 2, whole = channels & ~int64_t{7};
  if (channel_stride == 1) {
    finish_rows(totals, rows, first, whole, e);
  } else {
    for (int64_t o = 0; o < whole; o += 8)
      finish_planes(totals + o, rows, first + o, e, channel_stride * element, element);
  }
  if (whole < channels) finish_scalar(totals + whole, rows, first + whole, channels - whole, e, channel_stride);
}

// Rows of up to 16 taps, 16 channels at a time. Each is read as 16 bytes, so that the last ones need a copy.
void split_avx2(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out) {
  if (taps > 16 || channels < 16) return split_scalar(rows, count, channels, taps, out);
  const uint8_t* end = rows + count * channels * taps;
  uint8_t last[16 * 16 + 16] = {};
  for (int64_t row = 0; row < count; ++row, rows += channels * taps, out += channels * taps) {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      const uint8_t* from = rows + c * taps;
      if (end - from < 15 * taps + 16) {
        std::memcpy(last, from, 16 * taps);
        from = last;
      }
      transpose_16_bytes(from, taps, out + c, channels, static_cast<int>(taps));
    }
    for (; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) out[t * channels + c] = rows[c * taps + t];
  }
}

}  // namespace bitorch_engine
