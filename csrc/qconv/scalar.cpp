#include <cmath>
#include <cstring>

#include "bits/bits.h"
#include "qconv/results.h"
#include "runtime/convert.h"

namespace bitorch_engine {

void multiply_scalar(const Tile& tile) {
  for (int64_t i = 0; i < tile.count; ++i)
    for (int64_t b = 0; b < tile.blocks; ++b) {
      int32_t* totals = tile.totals + i * COLUMNS + b * BLOCK;
      for (int64_t o = 0; o < BLOCK; ++o) totals[o] = 0;
      for (const Read* read = tile.reads; read < tile.reads + tile.read_count; ++read) {
        const uint8_t* pixel = tile.rows[i] + read->image;
        const int8_t* weights = tile.weights + b * tile.block_bytes + read->weights;
        for (int64_t k = 0; k < tile.depth; k += 4, weights += 4 * BLOCK)
          for (int64_t o = 0; o < BLOCK; ++o)
            for (int64_t j = 0; j < 4; ++j) totals[o] += pixel[k + j] * weights[4 * o + j];
      }
    }
  if (tile.results) tile.results->take(tile.totals, 0, tile.count, 0, tile.blocks * BLOCK);
}

void decode_scalar(const uint8_t* packed, int64_t count, int bits, int8_t* codes) {
  unpack_scalar(packed, reinterpret_cast<uint8_t*>(codes), count, bits);
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(static_cast<uint8_t>(codes[i]) * step + low);
}

void finish_scalar(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels, const Epilogue& e,
                   int64_t channel_stride) {
  for (int64_t i = 0; i < rows.count; ++i) {
    uint8_t* out = rows.out + i * rows.step;
    for (int64_t o = first; o < first + channels; ++o) {
      float value = static_cast<float>(totals[i * COLUMNS + o - first] - e.zero_sum[o]) * e.factor[o];
      if (rows.sample_factor) value *= *rows.sample_factor;
      if (e.bias) value += e.bias[o];
      value += e.poison;
      const int64_t place = o * channel_stride;
      if (e.bytes) {
        const float byte = std::fmin(std::fmax(std::nearbyint(value) + static_cast<float>(e.zero), 0.0f), 255.0f);
        out[place] = static_cast<uint8_t>(byte);
      } else if (e.dtype == FLOAT32) {
        reinterpret_cast<float*>(out)[place] = value;
      } else {
        reinterpret_cast<uint16_t*>(out)[place] = e.dtype == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
      }
    }
  }
}

void split_scalar(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out) {
  for (int64_t row = 0; row < count; ++row, rows += channels * taps)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) *out++ = rows[c * taps + t];
}

}  // namespace bitorch_engine
