// AMX's tiles in software, as far as the kernels use them. What the processor would refuse ends the program.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitorch_engine {
namespace emulation {

struct MatrixTile {
  int rows = 0, bytes = 0;  // of a row
  uint8_t at[16][64] = {};
};

struct Tiles {
  bool configured = false;
  MatrixTile tile[8];

  MatrixTile& operator[](int index) {
    if (!configured || index < 0 || index > 7 || tile[index].rows == 0) __builtin_trap();
    return tile[index];
  }
};

static thread_local Tiles tiles;

// 64 bytes: the palette, the row to start with, 14 reserved; 16 times the bytes of a row, 16 times the rows.
static inline void load_configuration(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  if (bytes[0] != 1 || bytes[1] != 0) __builtin_trap();
  tiles = Tiles();
  tiles.configured = true;
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    tiles.tile[i].rows = bytes[48 + i];
    tiles.tile[i].bytes = row_bytes;
    if (tiles.tile[i].rows > 16 || row_bytes > 64 || (tiles.tile[i].rows == 0) != (row_bytes == 0)) __builtin_trap();
  }
}

static inline void clear(MatrixTile& t) { std::memset(t.at, 0, sizeof t.at); }

static inline void load(MatrixTile& t, const void* from, int64_t stride) {
  clear(t);
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.at[r], static_cast<const char*>(from) + r * stride, t.bytes);
}

static inline void store(const MatrixTile& t, void* to, int64_t stride) {
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, t.at[r], t.bytes);
}

// c[row][n] += sum of the products of four bytes of a[row] with the four bytes n of each row of b.
template <class Left, class Right>
static inline void multiply(MatrixTile& c, const MatrixTile& a, const MatrixTile& b) {
  if (a.rows != c.rows || b.bytes != c.bytes || a.bytes % 4 || a.bytes / 4 != b.rows || c.bytes % 4) __builtin_trap();
  for (int r = 0; r < c.rows; ++r) {
    uint32_t sums[16];
    std::memcpy(sums, c.at[r], sizeof sums);
    for (int k = 0; k < b.rows; ++k) {
      const uint8_t *left = a.at[r] + 4 * k, *right = b.at[k];
      for (int n = 0; n < c.bytes / 4; ++n)
        for (int i = 0; i < 4; ++i)
          sums[n] += static_cast<uint32_t>(static_cast<Left>(left[i]) * static_cast<Right>(right[4 * n + i]));
    }
    std::memcpy(c.at[r], sums, sizeof sums);
  }
}

}  // namespace emulation
}  // namespace bitorch_engine

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbuud
#undef _tile_dpbusd
#undef _tile_dpbsud
#undef _tile_dpbssd
#define BE_TILE(index) ::bitorch_engine::emulation::tiles[index]
#define BE_TILE_MULTIPLY(c, a, b, left, right) \
  ::bitorch_engine::emulation::multiply<left, right>(BE_TILE(c), BE_TILE(a), BE_TILE(b))
#define _tile_loadconfig(from) ::bitorch_engine::emulation::load_configuration(from)
#define _tile_release() (::bitorch_engine::emulation::tiles = ::bitorch_engine::emulation::Tiles())
#define _tile_zero(index) ::bitorch_engine::emulation::clear(BE_TILE(index))
#define _tile_loadd(index, from, stride) ::bitorch_engine::emulation::load(BE_TILE(index), from, stride)
#define _tile_stream_loadd(index, from, stride) _tile_loadd(index, from, stride)
#define _tile_stored(index, to, stride) ::bitorch_engine::emulation::store(BE_TILE(index), to, stride)
#define _tile_dpbuud(c, a, b) BE_TILE_MULTIPLY(c, a, b, uint8_t, uint8_t)
#define _tile_dpbusd(c, a, b) BE_TILE_MULTIPLY(c, a, b, uint8_t, int8_t)
#define _tile_dpbsud(c, a, b) BE_TILE_MULTIPLY(c, a, b, int8_t, uint8_t)
#define _tile_dpbssd(c, a, b) BE_TILE_MULTIPLY(c, a, b, int8_t, int8_t)
