#include <cmath>
#include <cstring>

#include "quantize/quantize.h"

namespace bitorch_engine {
namespace {

float to_float(const void* x, Dtype dtype, int64_t i) {
  if (dtype == FLOAT32) return static_cast<const float*>(x)[i];
  const uint32_t half = static_cast<const uint16_t*>(x)[i];
  uint32_t bits = half << 16;
  if (dtype == FLOAT16) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
    if (exponent == 0) {  // zero or below the normal range: a multiple of 2**-24
      const float value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

bool quantize_activation_scalar(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride,
                                int64_t pixels, int64_t channels, ActivationRule rule, uint8_t* out,
                                int64_t out_stride, uint8_t* beyond) {
  const float top = static_cast<float>((1 << rule.bits) - 1);
  bool odd = false;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = to_float(x, dtype, p * pixel_stride + c * channel_stride);
      odd |= !std::isfinite(value);
      float ratio = value * rule.inverse_scale;
      if (std::isnan(ratio)) ratio = 0;
      float index, outside;
      if (rule.bits == 1) {
        index = ratio >= 0;
        outside = std::fabs(ratio) > 1;
      } else {
        index = std::fmin(std::fmax(std::nearbyint(ratio) - rule.low, 0.0f), top);
        outside = index == 0 ? ratio < rule.low : ratio > index + rule.low;
      }
      out[p * out_stride + c] = static_cast<uint8_t>(static_cast<int>(index) * rule.step);
      if (beyond) beyond[p * out_stride + c] = outside != 0;
    }
  }
  return odd;
}

void floats_scalar(const uint8_t* index, int64_t count, int bits, float lowest, float factor, float* out) {
  const float step = bits == 1 ? 2.0f : 1.0f;
  for (int64_t i = 0; i < count; ++i) out[i] = (static_cast<float>(index[i]) * step + lowest) * factor;
}

}  // namespace bitorch_engine
