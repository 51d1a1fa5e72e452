// The padded, channels-last image of unsigned bytes that the engine reads.
#pragma once

#include <cstdint>

#include "qconv/product.h"
#include "quantize/quantize.h"
#include "runtime/buffer.h"

namespace bitorch_engine {

enum class SourceKind : int { FLOATS = 0, CODES = 1, GRADIENT = 2 };

// (N, padded, groups, image_depth) bytes, `zero` where the product reads padding, 0 in channels that fill up.
class Image {
 public:
  // FLOATS: x with the given strides (in elements), quantized by `scale` and `low`.  CODES: a packed stream of indices
  // of `bits` bits in channels-last order.  GRADIENT: signed bytes in channels-last order.
  Image(const Product& product, SourceKind kind, const void* x, Dtype dtype, int64_t sample_stride,
        int64_t channel_stride, const int64_t* steps, int bits, float scale, float low, int threads);

  const uint8_t* bytes() const { return bytes_.get(); }
  int zero() const { return zero_; }        // the byte that stands for 0
  int64_t largest() const { return largest_; }
  bool odd() const { return odd_; }         // whether a float was not finite

 private:
  Buffer<uint8_t> bytes_;
  int zero_;
  int64_t largest_;
  bool odd_ = false;
};

}  // namespace bitorch_engine
