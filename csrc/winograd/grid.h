// The tiles of a convolution that takes Winograd's way.
#pragma once

#include <algorithm>

#include "qconv/product.h"
#include "winograd/winograd.h"

namespace bitorch_engine {
namespace winograd {

// Whether the phase is all of a 3x3 convolution of stride 1, of a plane, not dilated, and the kernels are there.
bool is_plain(const Product& product, const Phase& phase);

// Of a tile, in tiles.
struct Position {
  int64_t sample, line, column;
};

// The tiles of a phase, line by line, sample by sample.
struct Grid {
  int64_t lines, columns, tiles;

  Grid(const Product& p, const Phase& phase)
      : lines((phase.count[1] + SIDE - 1) / SIDE),
        columns((phase.count[2] + SIDE - 1) / SIDE),
        tiles(p.batch * lines * columns) {}

  Position at(int64_t tile) const {
    const int64_t line = tile / columns;
    return {line / lines, line % lines, tile % columns};
  }

  // Pixel (i, j) that a tile reads is at starts[i] + steps[j], of the channel whose pixels begin at `image`. A tile at
  // the end of a line or of a column reads pixels that no result of it needs: any will do, for what comes of them
  // cancels; those at the edge of the image are taken.
  void locate(const Product& p, const Phase& phase, const uint8_t* image, int64_t tile, const uint8_t** starts,
              int64_t* steps) const {
    const Position t = at(tile);
    const int64_t* shift = phase.taps[0].shift;
    const int64_t y = t.line * SIDE + shift[1] + p.before[1], x = t.column * SIDE + shift[2] + p.before[2];
    const int64_t plane = t.sample * p.padded[0] + shift[0] + p.before[0];
    for (int64_t i = 0; i < READ; ++i) {
      const int64_t line = plane * p.padded[1] + std::min(y + i, p.padded[1] - 1);
      starts[i] = image + line * p.padded[2] * p.pixel_bytes();
      steps[i] = std::min(x + i, p.padded[2] - 1) * p.pixel_bytes();
    }
  }
};

}  // namespace winograd
}  // namespace bitorch_engine
