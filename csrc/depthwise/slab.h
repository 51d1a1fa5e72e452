// A band of lines of one sample, padded, as the depthwise kernels read it: see depthwise.h.
#pragma once

#include <cstdint>

#include "qconv/image.h"
#include "qconv/product.h"
#include "runtime/buffer.h"

namespace bitorch_engine {

// Where the values come from, as Image takes them.
struct Source {
  SourceKind kind;
  const void* x;
  Dtype dtype;
  int64_t sample, channel, step[3];  // strides of FLOATS
  int bits;
  float scale, low;

  int zero() const { return kind == SourceKind::GRADIENT ? 128 : bits == 1 ? 1 : static_cast<int>(-low); }
  ActivationRule rule() const { return {1.0f / scale, low, bits, bits == 1 ? 2 : 1}; }  // of FLOATS
  int64_t largest() const { return kind == SourceKind::GRADIENT ? 255 : bits == 1 ? 2 : (1 << bits) - 1; }
};

class Slab {
 public:
  // `most`: rows that it holds. Rows are of padded dimension 1, or of dimension 0 where the image has depth. Where
  // `square`, they are lines of pairs.
  Slab(const Product& product, const Source& source, int64_t most, bool square = false);

  // Rows first .. first + count - 1 of a sample; those that are there from the call before are moved.
  void fill(int64_t sample, int64_t first, int64_t count);

  const uint8_t* bytes() const { return bytes_.get(); }
  bool odd() const { return odd_; }  // whether a float was not finite

  static int dimension(const Product& p) { return p.padded[0] > 1 ? 0 : 1; }
  static int64_t lanes(const Product& p);        // result channels, padded
  static int64_t pixel_bytes(const Product& p);  // of all image channels of a group
  // With what makes lines even.
  static int64_t line_pixels(const Product& p) { return p.padded[2] + p.padded[2] % 2; }
  static int64_t row_pixels(const Product& p);

 private:
  void fill_line(int64_t sample, int64_t z, int64_t y, uint8_t* to);
  void fill_pixels(int64_t sample, int64_t z, int64_t y, uint8_t* to);
  void fill_planes(int64_t sample, int64_t first, int64_t last);
  void spread(const uint8_t* from, uint8_t* to) const;

  const Product& p_;
  const Source& source_;
  // planes_: where a channel's floats lie together, pixels from line first_plane_ on, quantized all at once.
  Buffer<uint8_t> bytes_, line_, pixels_, planes_;
  int64_t first_plane_ = 0;
  const bool square_, direct_, floats_;  // channels are lanes; float32 of them, side by side, become pairs at once
  int64_t sample_ = -1, first_ = 0, count_ = 0;
  bool odd_ = false;
};

}  // namespace bitorch_engine
