// The bits of the activations as the kernels read them: (N, depth, height, width, groups, words) of 32 bits each.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "binary/binary.h"
#include "binary/boxes.h"
#include "lookup/lookup.h"
#include "runtime/buffer.h"
#include "runtime/geometry.h"

namespace bitorch_engine {
namespace binary {

static inline int64_t words_of(int64_t channels) { return (channels + WORD - 1) / WORD; }

// `count` bits, at most WORD, from `bit` on of a packed stream that ends after `bytes`.
static inline uint32_t bits_at(const uint8_t* stream, int64_t bytes, int64_t bit, int64_t count) {
  const int64_t byte = bit / 8;
  uint64_t window = 0;
  std::memcpy(&window, stream + byte, bytes - byte < 8 ? bytes - byte : 8);
  return static_cast<uint32_t>(window >> bit % 8 & ((uint64_t{1} << count) - 1));
}

class Image {
 public:
  // The signs of x * inverse_scale, or at 2 bits the indices, counted from `low`. Strides in elements, in the order of
  // (N, C, depth, height, width). The geometry's channels are bits.
  Image(const Geometry& geometry, const void* x, Dtype dtype, const int64_t* strides, int64_t bits, float low,
        float inverse_scale, int threads);
  // A packed stream of codes in channels-last order. Where channels fill their words, it is the image.
  Image(const Geometry& geometry, const uint8_t* codes, int threads);

  const uint32_t* words() const { return words_; }
  bool odd() const { return odd_; }  // whether a float was not finite

 private:
  Buffer<uint32_t> own_;
  const uint32_t* words_ = nullptr;
  bool odd_ = false;
};

// The image as a lookup reads it: (N, depth, height, width, groups, entries).
class Entries {
 public:
  // lookup: null for none.
  Entries(const Geometry& geometry, const std::vector<Box>& boxes, const uint32_t* words, const lookup::Lookup* lookup,
          int threads);

  // For tiles along a dimension of the boxes.
  const uint16_t* along(int dimension) const { return entries_[partners_ ? dimension : 0].get(); }

 private:
  bool partners_;
  Buffer<uint16_t> entries_[4];
};

}  // namespace binary
}  // namespace bitorch_engine
