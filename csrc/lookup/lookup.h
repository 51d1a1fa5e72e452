// Products of codes of 1 and 2 bits looked up four bits at a time, for processors whose vectors shuffle bytes but count no
// ones. The bits x of four channels of a pixel (of two, at 2 bits) choose a table of 16 bytes, those of the weight, w, an
// entry in it:
//
//   1 bit:   table[x][w] = popcount(x ^ w)                                   total = products - 2 * sum
//   2 bits:  table[x][w] = products of the two codes, added, - their least   total = sum + least of all
//
//   of a vector of 32 result channels: sum += shuffle(table[x], w)
//
// A shuffle and an addition are 128 products of signs; exclusive or and population count take four times as many
// instructions.
//
// An *entry* is what is stored of eight bits of a pixel: the offset of a pair of tables, 16 bits. Of the weight there is a
// *panel* of up to 64 result channels, a byte for four bits of each:
//
//   [entry][lower, upper four bits][vector of 32 result channels]
//
//   bytes of a vector: 0 16 1 17 2 18 3 19 8 24 9 25 10 26 11 27 | 4 20 5 21 6 22 7 23 12 28 13 29 14 30 15 31
//
// so that the even bytes and the odd ones, widened to 32 bits, are each in order: the halves of a vector unpack apart.
#pragma once

#include <cstdint>

#include "binary/binary.h"

namespace bitorch_engine {
namespace lookup {

// What the bits of an entry and of a weight are worth together. Sums are held in 8 bits, then in 16.
struct Table {
  alignas(64) uint8_t values[256][2][16];  // by the bits of an entry: a pair, for the lower and the upper four bits
  int32_t times;                           // total = a constant + times * sum
  int32_t least;                           // of what a value stands for: a value counts from it
  int64_t longest;                         // entries of a segment, for 8 bits
  int64_t most;                            // entries of a result, for 16 bits
};
extern const Table signs;                            // 1 bit
extern const Table unsigned_pairs, signed_pairs;     // 2 bits: activations 0 .. 3 and -2 .. 1, weights -2 .. 1

static inline int64_t entries_of(int64_t bits) { return (bits + 7) / 8; }
static inline int64_t panel_bytes(int64_t entries, int64_t blocks) { return entries * 2 * 32 * ((blocks + 1) / 2); }

// The kernels of one instruction set.
struct Lookup {
  // Entries of `runs` times `bits` bits, each run in whole words, from words to out.
  void (*entries)(const uint32_t* words, int64_t runs, int64_t bits, uint16_t* out);
  // The panel of `blocks` blocks of the arranged weight, block_words apart: `taps` times `bits` bits each.
  void (*panel)(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t bits, uint8_t* out);
  // As binary::MultiplyFunction, but that segments count in entries, and total = tile.products + table.times * sum.
  void (*multiply)(const binary::Tile& tile, const Table& table, const uint16_t* image, const uint8_t* panel);
};
extern const Lookup lookup_avx2;

}  // namespace lookup
}  // namespace bitorch_engine
