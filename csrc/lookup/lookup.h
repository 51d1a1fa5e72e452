// Products of codes of 1 and 2 bits looked up four bits at a time, for processors whose vectors shuffle bytes but count
// no ones. The bits of an activation choose a table of 16 bytes, those of the weight, w, an entry in it:
//
//   1 bit:   x and y, four channels of two pixels
//            table[x, y][w] = popcount(x ^ w) + 16 * popcount(y ^ w)         total = products - 2 * sum
//   2 bits:  x, four channels of a pixel, and w, the lower bits of four weights, or the upper ones, which count -2
//            table[x][w] = codes where w is 1, added, - their least
//                                                                    total = sum - 2 * sum of the upper ones - least
//
//   of a vector of 32 result channels: sum += shuffle(table, w)
//
// At 1 bit, three sums of two pixels fit a byte before its halves are parted, for which the upper ones alone are
// counted again: a shuffle and less than two operations more are 256 products. Exclusive or and population count take
// seven times as many instructions.
//
// What is stored of a pixel are *entries*, offsets of tables, 16 bits each: at 1 bit one for four bits of it and of the
// pixel beside it in a tile, at 2 bits one for eight bits. Of the weight there is a *panel* of the result channels
// of a tile, a byte for four bits of each:
//
//   [four bits][vector of 32 result channels]
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
  const uint8_t* values;
  int32_t least;    // of what a value stands for: a value counts from it
  int64_t longest;  // entries whose sum fits 8 bits, and so those of a segment; a sum of 256 signs is told from 0
  int64_t most;     // entries whose sum fits 16 bits; of signs, twice
};
extern const Table signs;                         // 1 bit
extern const Table unsigned_pairs, signed_pairs;  // 2 bits: activations 0 .. 3 and -2 .. 1, weights -2 .. 1

// Sums of pairs are -24 to 12 an entry.
constexpr int32_t PAIRS_MOST = 65535 / (12 + 24), PAIRS_START = 24 * PAIRS_MOST;

static inline int64_t bytes_of(int64_t bits) { return (bits + 7) / 8; }
// bytes: of a result channel.
static inline int64_t panel_bytes(int64_t bytes, int64_t blocks) { return bytes * 2 * 32 * ((blocks + 1) / 2); }

// Entries of `runs` times `bits` bits, each run in whole words, from words to out. seconds: of the second pixels, at 1
// bit.
using EntriesFunction = void (*)(const uint32_t* words, const uint32_t* seconds, int64_t runs, int64_t bits,
                                 uint16_t* out);
// The panel of `blocks` blocks of the arranged weight, block_words apart: `taps` times `bits` bits each. Vectors of
// which half has no block are filled up with 0.
using PanelFunction = void (*)(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t bits,
                               uint8_t* out);
// As binary::MultiplyFunction, but that segments count in entries, and total = tile.products + what the sums add.
using LookUpFunction = void (*)(const binary::Tile& tile, const Table& table, const uint16_t* image,
                                const uint8_t* panel);
// Rows of COLUMNS results of a pixel, of which `channels` are there, a multiple of 4, to pixels that are `step` apart
// and channels that are `plane` apart.
using TurnFunction = void (*)(const float* rows, int64_t pixels, int64_t channels, float* out, int64_t step,
                              int64_t plane);

#define BE_LOOKUP(isa)                                                                                              \
  void sign_entries_##isa(const uint32_t* words, const uint32_t* seconds, int64_t runs, int64_t bits, uint16_t* out); \
  void pair_entries_##isa(const uint32_t* words, const uint32_t* seconds, int64_t runs, int64_t bits, uint16_t* out); \
  void panel_##isa(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t bits,          \
                   uint8_t* out);                                                                                     \
  void signs_##isa(const binary::Tile& tile, const Table& table, const uint16_t* image, const uint8_t* panel);        \
  void pairs_##isa(const binary::Tile& tile, const Table& table, const uint16_t* image, const uint8_t* panel);        \
  void turn_##isa(const float* rows, int64_t pixels, int64_t channels, float* out, int64_t step, int64_t plane);
BE_LOOKUP(scalar)
BE_LOOKUP(avx2)
#undef BE_LOOKUP

extern const Kernel<EntriesFunction> sign_entries_kernel, pair_entries_kernel;
extern const Kernel<PanelFunction> panel_kernel;
extern const Kernel<LookUpFunction> signs_kernel, pairs_kernel;
extern const Kernel<TurnFunction> turn_kernel;

// The tiles of signs or of pairs.
struct Lookup {
  int64_t pixels;   // of a tile at most
  int64_t blocks;   // and blocks, where it stores floats; else binary::MOST_BLOCKS
  int64_t entries;  // for eight bits of a pixel
  bool partners;    // an entry has bits of two pixels
  const Kernel<EntriesFunction>& entries_kernel;
  const Kernel<LookUpFunction>& multiply_kernel;
};
extern const Lookup of_signs, of_pairs;

}  // namespace lookup
}  // namespace bitorch_engine
