// What the integer convolution engine computes, in one form for all four uses (see docs/kernels.md):
//
//   result[n, o, y] = sum over taps t, channels c of (u[n, c, base(y) + offset(t)] - zero) * w[o, c, t]
//
//            gathers from          scatter   rows of the packed weight are
//   convolution, forward            no       result channels
//   convolution, input gradient     yes      image channels
//   transposed, forward             yes      result channels
//   transposed, input gradient      no       image channels
//
// u is the *image*: unsigned bytes, channels last, padded with `zero`, so that padding needs no case of its own, though
// products with it may be left out (regions.h). Where a stride scatters, the result falls into phases, one per residue
// of its position modulo the stride; each phase is a convolution of stride 1 with those taps that reach it.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/geometry.h"

namespace bitorch_engine {

constexpr int64_t BLOCK = 16;      // result channels whose weights lie together
constexpr int64_t DEPTH = 64;      // products per result that lie together: k is padded to a multiple of it
constexpr int64_t ROWS = 96;       // result pixels whose totals are there at a time: a multiple of 6 and of 16
constexpr int64_t COLUMNS = 64;    // result channels handled at a time

struct Tap {
  int64_t weight;    // index of the tap in the packed weight
  int64_t shift[3];  // where it reads, in pixels from the base
};

struct Phase {
  std::vector<Tap> taps;       // by depth, height and width: in each their shifts rise, by equal steps
  int64_t tap_count[3];
  int64_t first[3], count[3];  // its result pixels: first + step * (0 .. count - 1)
  int64_t depth;               // products per result, padded: a multiple of DEPTH
  int64_t weights;             // where its arranged weights start, in values
  int64_t first_tap;           // taps of the phases before
};

struct Product {
  int64_t batch, groups;
  int64_t image_channels, result_channels;  // of one group
  int64_t image_depth;                      // image_channels, padded to a multiple of 4
  int64_t image[3], padded[3], before[3];   // sizes without and with padding; padding before the start
  int64_t result[3];
  int64_t base_step[3];    // the base moves by it from one result pixel of a phase to the next
  int64_t result_step[3];  // and the result pixel by this
  bool rows_are_results;
  int64_t taps;            // of the whole kernel
  std::vector<Phase> phases;

  Product(const Geometry& geometry, bool scatter, bool rows_are_results);

  int64_t pixel_bytes() const { return groups * image_depth; }
  int64_t image_pixels() const { return image[0] * image[1] * image[2]; }
  int64_t padded_pixels() const { return padded[0] * padded[1] * padded[2]; }
  int64_t result_pixels() const { return result[0] * result[1] * result[2]; }
  int64_t blocks() const { return (result_channels + BLOCK - 1) / BLOCK; }  // of one group
  int64_t arranged_values() const;  // of all phases, groups and blocks
};

}  // namespace bitorch_engine
