// Matrices of bytes, turned.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bitorch_engine {

#if defined(__SSE2__)
// 16 rows of 16 bytes, of which the first `columns` columns are stored: four rounds, each of which interleaves row i
// with row i + 8.
static inline void transpose_16_bytes(const uint8_t* from, int64_t stride, uint8_t* to, int64_t pitch,
                                      int columns = 16) {
  __m128i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < columns) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * pitch), r[i]);
}
#endif

// to[column * pitch + row] = from[row * stride + column]
static inline void transpose_bytes(const uint8_t* from, int64_t rows, int64_t columns, int64_t stride, uint8_t* to,
                                   int64_t pitch) {
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(__SSE2__)
  whole_rows = rows & ~int64_t{15};
  whole_columns = columns & ~int64_t{15};
  for (int64_t r = 0; r < whole_rows; r += 16)
    for (int64_t c = 0; c < whole_columns; c += 16)
      transpose_16_bytes(from + r * stride + c, stride, to + c * pitch + r, pitch);
#endif
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) to[c * pitch + r] = from[r * stride + c];
}

}  // namespace bitorch_engine
