// The weight in the order in which the kernels read it, at one bit a weight:
//
//   arranged[group][block of 16 result channels][tap][word of 32 channels][16 result channels]
//
// What fills up the last word and the last block is 0.
#include <algorithm>
#include <cstring>
#include <memory>

#include "binary/image.h"
#include "runtime/parallel.h"

using namespace bitorch_engine;
using namespace bitorch_engine::binary;

// Words of the arranged weight.
BE_EXPORT int64_t be_binary_arranged_words(const Geometry* g) {
  const int64_t blocks = (g->out_channels / g->groups + LANES - 1) / LANES;
  return g->groups * blocks * LANES * g->taps() * words_of(g->in_channels / g->groups);
}

// packed: the canonical stream.
BE_EXPORT void be_binary_arrange(const Geometry* geometry, const uint8_t* packed, uint32_t* out, int threads) {
  const Geometry& g = *geometry;
  const int64_t channels = g.in_channels / g.groups, results = g.out_channels / g.groups, taps = g.taps();
  const int64_t blocks = (results + LANES - 1) / LANES, columns = channels * taps;
  const int64_t bytes = (g.out_channels * columns + 7) / 8;
  const int64_t block_words = LANES * taps * words_of(channels);
  const auto arrange = arrange_kernel.pick();
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, LANES * columns));
  parallel_for(g.groups * blocks, grain, threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<uint8_t[]> row(new uint8_t[columns / 8 + 2 + 64]());
    for (int64_t b = first; b < last; ++b) {
      uint32_t* block = out + b * block_words;
      const int64_t channel = b % blocks * LANES, some = std::min(LANES, results - channel);
      if (some < LANES) std::memset(block, 0, block_words * sizeof *block);
      for (int64_t lane = 0; lane < some; ++lane) {
        const int64_t bit = (b / blocks * results + channel + lane) * columns;
        if (taps == 1) {
          for (int64_t c = 0; c < channels; c += WORD)
            block[c / WORD * LANES + lane] = bits_at(packed, bytes, bit + c, std::min(WORD, channels - c));
          continue;
        }
        const int first_bit = static_cast<int>(bit % 8);
        std::memcpy(row.get(), packed + bit / 8, (first_bit + columns + 7) / 8);
        arrange(row.get(), first_bit, channels, taps, block + lane);
      }
    }
  });
}
