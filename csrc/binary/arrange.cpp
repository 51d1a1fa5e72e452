// The weight in the order in which the kernels read it, at one bit a weight, or two:
//
//   arranged[group][block of 16 result channels][tap][word of 32 bits of channels][16 result channels]
//
// At 2 bits a byte has four channels: a weight is its lower bit less twice its upper bit, as two's complement has it.
//
//   lower bits of channels 0 1 2 3 | upper bits of channels 0 1 2 3
//
// What fills up the last word and the last block is 0.
#include <algorithm>
#include <cstring>
#include <memory>

#include "binary/image.h"
#include "runtime/parallel.h"

using namespace bitorch_engine;
using namespace bitorch_engine::binary;

namespace {

// One row of weights of 2 bits, the value `first` of `packed` and what follows, to one lane of a block that is 0.
void arrange_pairs(const uint8_t* packed, int64_t first, int64_t channels, int64_t taps, uint32_t* out) {
  const int64_t words = words_of(2 * channels);
  for (int64_t c = 0, i = first; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t, ++i) {
      const uint32_t code = (packed[i / 4] >> i % 4 * 2 & 3) ^ 2;  // the index counts from -2
      out[(t * words + 2 * c / WORD) * LANES] |= ((code & 1) | (code >> 1) << 4) << (2 * (c & ~3) % WORD + c % 4);
    }
}

}  // namespace

// Words of the arranged weight.
BE_EXPORT int64_t be_binary_arranged_words(const Geometry* g, int bits) {
  const int64_t blocks = (g->out_channels / g->groups + LANES - 1) / LANES;
  return g->groups * blocks * LANES * g->taps() * words_of(g->in_channels / g->groups * bits);
}

// packed: the canonical stream.
BE_EXPORT void be_binary_arrange(const Geometry* geometry, int bits, const uint8_t* packed, uint32_t* out,
                                 int threads) {
  const Geometry& g = *geometry;
  const int64_t channels = g.in_channels / g.groups, results = g.out_channels / g.groups, taps = g.taps();
  const int64_t blocks = (results + LANES - 1) / LANES, columns = channels * taps;
  const int64_t bytes = (g.out_channels * columns + 7) / 8;
  const int64_t block_words = LANES * taps * words_of(channels * bits);
  const auto arrange = arrange_kernel.pick();
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, LANES * columns));
  parallel_for(g.groups * blocks, grain, threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<uint8_t[]> row(new uint8_t[columns / 8 + 2 + 64]());
    for (int64_t b = first; b < last; ++b) {
      uint32_t* block = out + b * block_words;
      const int64_t channel = b % blocks * LANES, some = std::min(LANES, results - channel);
      if (some < LANES || bits == 2) std::memset(block, 0, block_words * sizeof *block);
      for (int64_t lane = 0; lane < some; ++lane) {
        const int64_t bit = (b / blocks * results + channel + lane) * columns;
        if (bits == 2) {
          arrange_pairs(packed, bit, channels, taps, block + lane);
          continue;
        }
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
