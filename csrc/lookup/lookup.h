// Products of 1-bit codes looked up four at a time, for processors whose vectors shuffle bytes but count no ones.
//
// The signs x of four channels of a pixel choose a table of 16 bytes, and those of the weight, w, an entry in it:
//
//   table[x][w] = popcount(x ^ w)          a vector of 32 result channels: sum += shuffle(table[x], w)
//
// A shuffle and an addition are 128 products; exclusive or and population count take four times as many instructions.
//
// An *entry* is what is stored of eight channels of a pixel: the offset of a pair of tables, 16 bits. Of the weight
// there is a *panel* of up to 64 result channels, a byte for four bits of each:
//
//   [entry][lower, upper four channels][vector of 32 result channels]
//
//   bytes of a vector: 0 16 1 17 2 18 3 19 8 24 9 25 10 26 11 27 | 4 20 5 21 6 22 7 23 12 28 13 29 14 30 15 31
//
// so that the even bytes and the odd ones, widened to 32 bits, are each in order: the halves of a vector unpack apart.
#pragma once

#include <cstdint>

#include "binary/binary.h"

namespace bitorch_engine {
namespace lookup {

constexpr int64_t DEPTH = 8;  // channels of an entry
constexpr int64_t LONGEST = 31;  // entries of a segment: a byte holds their sum
constexpr int64_t MOST_ENTRIES = 65535 / DEPTH;  // of a result: sums are held in 16 bits

static inline int64_t entries_of(int64_t channels) { return (channels + DEPTH - 1) / DEPTH; }
static inline int64_t panel_bytes(int64_t entries, int64_t blocks) { return entries * 2 * 32 * ((blocks + 1) / 2); }

// The kernels of one instruction set.
struct Lookup {
  // Entries of `runs` times `channels` bits, each run in whole words, from words to out.
  void (*entries)(const uint32_t* words, int64_t runs, int64_t channels, uint16_t* out);
  // The panel of `blocks` blocks of the arranged weight, block_words apart: `taps` times `channels` bits each.
  void (*panel)(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t channels,
                uint8_t* out);
  // As binary::MultiplyFunction.
  void (*multiply)(const binary::Tile& tile, const uint16_t* image, const uint8_t* panel);
};
extern const Lookup lookup_avx2;

}  // namespace lookup
}  // namespace bitorch_engine
