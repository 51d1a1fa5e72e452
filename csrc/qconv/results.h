// From the totals of a tile to results in memory.
#pragma once

#include "qconv/product.h"
#include "qconv/qconv.h"

namespace bitorch_engine {

// Takes the totals of a tile, all at once or part by part.
struct Results {
  FinishFunction finish;
  Epilogue epilogue;
  const Stretch* stretches;                 // the tile's rows
  int64_t first, channels, channel_stride;  // channels of the tile: in its last block there may be fewer than 16

  // Inlined, always, as Kernel::pick (runtime/table.h).
  // totals: those of `count` rows and `columns` columns of the tile, from its row `row` and its column `column` on.
  __attribute__((always_inline)) void take(const int32_t* totals, int64_t row, int64_t count, int64_t column,
                                           int64_t columns) const {
    const int64_t present = channels - column < columns ? channels - column : columns;
    const Stretch* stretch = stretches;
    for (; row >= stretch->count; ++stretch) row -= stretch->count;
    for (; count > 0; ++stretch, row = 0) {
      Stretch part = *stretch;
      part.out += row * part.step;  // null stays null: its step is 0
      part.count = part.count - row < count ? part.count - row : count;
      if (part.out) finish(totals, part, first + column, present, epilogue, channel_stride);
      totals += part.count * COLUMNS;
      count -= part.count;
    }
  }
};

}  // namespace bitorch_engine
