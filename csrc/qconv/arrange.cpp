// The weight in the order in which the engine reads it, and back into signed bytes.
//
//   arranged[phase][group][block of 16 result channels][k / 4][16 channels][4 of k]     k = (tap of the phase, channel)
//
// It is one stream of values, packed as bits/packing.py says; or, where it is used once (in training), signed bytes.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bits/bits.h"
#include "qconv/product.h"
#include "qconv/qconv.h"
#include "runtime/parallel.h"

namespace bitorch_engine {
namespace {

// The values of one block, and the sum of each of its result channels, read as `Value`. What fills up is 0, and worth
// nothing whatever it decodes to: the image is 0 there.
template <class Value>
void arrange_block(const Product& p, const Phase& phase, int64_t group, int64_t block, const uint8_t* index,
                   uint8_t* out, int32_t* sums) {
  const int64_t columns = (p.rows_are_results ? p.image_channels : p.result_channels) * p.taps;
  const int64_t rows = p.rows_are_results ? p.result_channels : p.image_channels;
  const int64_t by_result = p.rows_are_results ? columns : p.taps, by_image = p.rows_are_results ? p.taps : columns;
  const int64_t present = std::min(BLOCK, p.result_channels - block * BLOCK);
  const uint8_t* start = index + group * rows * columns + block * BLOCK * by_result;
  std::memset(out, 0, BLOCK * phase.depth);
  std::memset(sums, 0, BLOCK * sizeof *sums);
  for (size_t t = 0; t < phase.taps.size(); ++t) {
    const uint8_t* tap = start + phase.taps[t].weight;
    for (int64_t c = 0; c < p.image_channels; c += 4) {
      uint8_t* to = out + (static_cast<int64_t>(t) * p.image_depth + c) * BLOCK;
      const int64_t some = std::min<int64_t>(4, p.image_channels - c);
      for (int64_t o = 0; o < present; ++o) {
        const uint8_t* from = tap + o * by_result + c * by_image;
        if (some == 4) {
          const uint32_t word = from[0] | from[by_image] << 8 | from[2 * by_image] << 16 |
                                static_cast<uint32_t>(from[3 * by_image]) << 24;
          std::memcpy(to + 4 * o, &word, 4);
          sums[o] += static_cast<Value>(from[0]) + static_cast<Value>(from[by_image]) +
                     static_cast<Value>(from[2 * by_image]) + static_cast<Value>(from[3 * by_image]);
        } else {
          for (int64_t i = 0; i < some; ++i) {
            to[4 * o + i] = from[i * by_image];
            sums[o] += static_cast<Value>(from[i * by_image]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// Values of the arranged weight, padding included: bytes are values * bits / 8.
BE_EXPORT int64_t be_qconv_arranged_values(const Geometry* geometry, int scatter, int rows_are_results) {
  return Product(*geometry, scatter, rows_are_results).arranged_values();
}

BE_EXPORT int64_t be_qconv_phases(const Geometry* geometry, int scatter, int rows_are_results) {
  return static_cast<int64_t>(Product(*geometry, scatter, rows_are_results).phases.size());
}

// packed: the canonical stream.  out: the arranged one, of out_bits: `bits`, or 8 for signed codes.
// sums: (phases, groups * blocks * 16) int32, the sum of the codes that each result has in a phase.
BE_EXPORT void be_qconv_arrange(const Geometry* geometry, int scatter, int rows_are_results, const uint8_t* packed,
                                int bits, int out_bits, uint8_t* out, int32_t* sums, int threads) {
  const Product p(*geometry, scatter, rows_are_results);
  const int64_t count = p.groups * p.image_channels * p.result_channels * p.taps;
  const std::unique_ptr<uint8_t[]> index(new uint8_t[count + 8]);
  parallel_for(count, 1 << 16, threads, [&](int64_t first, int64_t last) {
    unpack_range(packed, first, last - first, bits, index.get() + first);
  });
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  const bool codes = out_bits == 8;
  if (codes)
    for (int64_t i = 0; i < count; ++i) index[i] = static_cast<uint8_t>(index[i] * step + low);
  const int64_t blocks = p.groups * p.blocks();
  const auto pack = pack_kernel.pick();
  for (size_t f = 0; f < p.phases.size(); ++f) {
    const Phase& phase = p.phases[f];
    const int64_t values = BLOCK * phase.depth;
    parallel_for(blocks, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(values, 1)), threads,
                 [&](int64_t first, int64_t last) {
      const std::unique_ptr<uint8_t[]> scratch(codes ? nullptr : new uint8_t[values]);
      for (int64_t b = first; b < last; ++b) {
        uint8_t* place = codes ? out + phase.weights + b * values : scratch.get();
        int32_t* sum = sums + (static_cast<int64_t>(f) * blocks + b) * BLOCK;
        if (codes) {
          arrange_block<int8_t>(p, phase, b / p.blocks(), b % p.blocks(), index.get(), place, sum);
        } else {
          arrange_block<uint8_t>(p, phase, b / p.blocks(), b % p.blocks(), index.get(), place, sum);
          const int64_t products = static_cast<int64_t>(phase.taps.size()) * p.image_channels;
          for (int64_t o = 0; o < BLOCK; ++o) sum[o] = sum[o] * step + static_cast<int32_t>(products) * low;
        }
        if (!codes) pack(place, out + (phase.weights + b * values) / 8 * bits, values, bits);
      }
    });
  }
}
