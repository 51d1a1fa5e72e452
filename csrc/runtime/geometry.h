// The geometry of a convolution, for every kernel: always three spatial dimensions, the leading ones of length 1 where
// a layer has fewer. bitorch_engine/ops/cpu/geometry.py fills it in; the two must have the same fields in the same
// order.
#pragma once

#include <cstdint>

namespace bitorch_engine {

// A correlation that is not transposed:
//   out[n, o, y] = sum over (c, k) of in[n, c, y * stride + k * dilation - pad] w[o, c, k]
// Channels are those of all groups. pad may differ between the sides: what is behind the end follows from `out`.
struct Geometry {
  int64_t batch, in_channels, out_channels, groups;
  // depth, height, width; pad: zeros before the start
  int64_t in[3], kernel[3], stride[3], dilation[3], pad[3], out[3];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t in_pixels() const { return in[0] * in[1] * in[2]; }
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
};

}  // namespace bitorch_engine
