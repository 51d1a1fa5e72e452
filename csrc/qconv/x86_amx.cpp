#include <immintrin.h>

#include "qconv/results.h"

namespace bitorch_engine {
namespace {

// Eight tiles of 16 rows of 64 bytes: 0 - 3 totals, 4 and 5 pixels, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

constexpr int64_t LONGEST = 32;  // more than a run has rows

void release() { _tile_release(); }

// Tiles of `upper` and `lower` pixels; lower may be 0.
void configure(int64_t upper, int64_t lower, Setup* setup) {
  TileConfig config;
  for (int tile : {0, 1, 4}) config.rows[tile] = static_cast<uint8_t>(upper);
  for (int tile : {2, 3, 5}) config.rows[tile] = static_cast<uint8_t>(lower > 0 ? lower : 1);
  config.rows[6] = config.rows[7] = 16;
  // To the compiler, the intrinsic reads no more than the first eight bytes.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  setup->shape = upper * LONGEST + lower;
  setup->release = release;
}

int64_t distance(const Tile& t, int64_t first, int64_t rows) {
  return rows > 1 ? t.rows[first + 1] - t.rows[first] : 64;
}

template <bool lower, bool right>
void multiply(const Tile& t, int64_t first, int64_t upper, int64_t upper_stride, int64_t lower_stride,
              const int8_t* block, int32_t* totals) {
  _tile_zero(0);
  if (right) _tile_zero(1);
  if (lower) _tile_zero(2);
  if (lower && right) _tile_zero(3);
  for (const Read *read = t.reads, *end = read + t.read_count; read < end; ++read) {
    const int8_t* weights = block + read->weights;
    const uint8_t* a = t.rows[first] + read->image;
    const uint8_t* b = lower ? t.rows[first + upper] + read->image : nullptr;
    for (int64_t k = 0; k < t.depth; k += 64, weights += 16 * 64) {
      _tile_loadd(4, a + k, upper_stride);
      _tile_loadd(6, weights, 64);
      _tile_dpbusd(0, 4, 6);
      if (lower) {
        _tile_loadd(5, b + k, lower_stride);
        _tile_dpbusd(2, 5, 6);
      }
      if (right) {
        _tile_loadd(7, weights + t.block_bytes, 64);
        _tile_dpbusd(1, 4, 7);
        if (lower) _tile_dpbusd(3, 5, 7);
      }
    }
  }
  constexpr int64_t pitch = COLUMNS * sizeof(int32_t);
  _tile_stored(0, totals, pitch);
  if (right) _tile_stored(1, totals + 16, pitch);
  if (lower) _tile_stored(2, totals + upper * COLUMNS, pitch);
  if (lower && right) _tile_stored(3, totals + upper * COLUMNS + 16, pitch);
}

// The totals of two runs that are complete. They become results while the next two are multiplied, which keeps the
// matrix unit busy but not the vector units: some rows after each product.
struct Finished {
  const Results* results;
  const int32_t* totals;
  int64_t row, count, columns;

  void take(int64_t most) {
    const int64_t some = count < most ? count : most;
    if (some == 0) return;
    results->take(totals, row, some, 0, columns);
    totals += some * COLUMNS;
    row += some;
    count -= some;
  }
};

}  // namespace

// depth is a multiple of 64.
void multiply_amx(const Tile& t) {
  constexpr int64_t MOST = 32;  // rows of two runs
  Finished finished{};
  const int64_t products = (t.blocks + 1) / 2;
  for (int64_t run = 0, i = 0; run < t.run_count; run += 2) {
    const int64_t upper = t.runs[run], lower = run + 1 < t.run_count ? t.runs[run + 1] : 0, rows = upper + lower;
    if (t.setup->shape != upper * LONGEST + lower) configure(upper, lower, t.setup);
    const int64_t upper_stride = distance(t, i, upper), lower_stride = distance(t, i + upper, lower);
    // Where they become results, the totals alternate between two places, which stay in the L1 cache.
    int32_t* const place = t.totals + (t.results ? run / 2 % 2 * MOST : i) * COLUMNS;
    const int64_t slice = (finished.count + products - 1) / products;
    for (int64_t b = 0; b < t.blocks; b += 2) {
      const int8_t* weights = t.weights + b * t.block_bytes;
      int32_t* const totals = place + b * BLOCK;
      const bool right = b + 1 < t.blocks;
      if (lower && right) multiply<true, true>(t, i, upper, upper_stride, lower_stride, weights, totals);
      else if (lower) multiply<true, false>(t, i, upper, upper_stride, lower_stride, weights, totals);
      else if (right) multiply<false, true>(t, i, upper, upper_stride, lower_stride, weights, totals);
      else multiply<false, false>(t, i, upper, upper_stride, lower_stride, weights, totals);
      finished.take(slice);
    }
    if (t.results) finished = {t.results, place, i, rows, t.blocks * BLOCK};
    i += rows;
  }
  finished.take(MOST);
}

}  // namespace bitorch_engine
