// A line of results as tiles, whose sums stay in registers. Included once per instruction set.
#include <cstring>

#include "float_conv/float_conv.h"

namespace bitorch_engine {
namespace {

// A tile has rows, whose operand is broadcast, and lanes: pixels and channels, or the other way round. Row i of the
// results goes to out + i * pitch.
struct Tile {
  const float* const* values;
  int64_t depth, first;  // first: pixel, times the distance of pixels
  const float *weights, *start;
  int64_t step;  // from row to row, of the operand that is broadcast
  float* out;
  int64_t pitch;
};
using TileFunction = void (*)(const Tile& tile);

// What is multiplied: a vector of each product for all rows, and one number for each row.
template <bool CHANNELS_LAST>
inline const float* lanes_of(const Tile& t, int64_t k) {
  return CHANNELS_LAST ? t.weights + k * FLOAT_BLOCK : t.values[k] + t.first;
}

template <bool CHANNELS_LAST>
inline const float* rows_of(const Tile& t, int64_t k) {
  return CHANNELS_LAST ? t.values[k] + t.first : t.weights + k;
}

// Tiles of `width` lanes: tiles[i] has i + 1 rows.
struct Tiles {
  int64_t width, most;
  const TileFunction* tiles;
};

// `rows` rows from `row` on, and the lanes from `lane` on.
inline void multiply_tile_of(const ConvLine& l, int64_t row, int64_t rows, int64_t lane, const Tiles& tiles) {
  float* const out = l.out + row * l.pitch + lane;
  Tile tile{l.values, l.depth, lane, l.weights + row * l.depth, l.start + row, l.depth, out, l.pitch};
  if (l.channels_last) {
    // Each tile but the last has whole blocks, so that this one begins with a block.
    tile = {l.values, l.depth, row * l.step, l.weights + lane * l.depth, l.start + lane, l.step, out, l.pitch};
  }
  const int64_t present = (l.channels_last ? l.channels : l.pixels) - lane;
  if (present >= tiles.width) return tiles.tiles[rows - 1](tile);
  float whole[16 * 2 * FLOAT_BLOCK];  // lanes that are not there would overwrite other results
  tile.out = whole;
  tile.pitch = tiles.width;
  tiles.tiles[rows - 1](tile);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * l.pitch, whole + i * tiles.width, present * sizeof(float));
}

// So many of `left` rows that all tiles have about as many: those with few rows wait for their sums.
inline int64_t share(int64_t left, int64_t most) {
  const int64_t count = (left + most - 1) / most;
  return (left + count - 1) / count;
}

// slim: for the last lanes, where they are few. What is read again and again is some channels' weights, in the L1
// cache.
inline void multiply_line(const ConvLine& l, const Tiles& wide, const Tiles& slim) {
  const int64_t lanes = l.channels_last ? l.channels : l.pixels, rows = l.channels_last ? l.pixels : l.channels;
  if (l.channels_last) {
    for (int64_t lane = 0; lane < lanes;) {
      const Tiles& tiles = lanes - lane > slim.width ? wide : slim;
      for (int64_t row = 0, some; row < rows; row += some) {
        some = share(rows - row, tiles.most);
        multiply_tile_of(l, row, some, lane, tiles);
      }
      lane += tiles.width;
    }
  } else {
    for (int64_t row = 0, some; row < rows; row += some) {
      some = share(rows - row, wide.most);
      for (int64_t lane = 0; lane < lanes;) {
        const Tiles& tiles = lanes - lane > slim.width ? wide : slim;
        multiply_tile_of(l, row, some, lane, tiles);
        lane += tiles.width;
      }
    }
  }
}

}  // namespace
}  // namespace bitorch_engine
