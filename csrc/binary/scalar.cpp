#include <cmath>
#include <cstring>

#include "binary/binary.h"
#include "qconv/product.h"
#include "runtime/convert.h"

namespace bitorch_engine {
namespace binary {
namespace {

float value_at(const void* x, Dtype dtype, int64_t i) {
  if (dtype == FLOAT32) return static_cast<const float*>(x)[i];
  const uint16_t half = static_cast<const uint16_t*>(x)[i];
  return dtype == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

}  // namespace

void multiply_scalar(const Tile& t) {
  for (int64_t i = 0; i < t.count; ++i) {
    const uint32_t* pixel = t.image + i * t.image_step;
    for (int64_t o = 0; o < t.blocks * LANES; ++o) {
      const uint32_t* lane = t.weights + o / LANES * t.block_words + o % LANES;
      int64_t differing = 0;
      for (int64_t s = 0; s < t.segment_count; ++s) {
        const Segment& segment = t.segments[s];
        const uint32_t* bits = pixel + segment.image;
        const uint32_t* weights = lane + segment.weights * LANES;
        for (int64_t k = 0; k < segment.words; ++k) differing += __builtin_popcount(bits[k] ^ weights[k * LANES]);
      }
      const int32_t total = static_cast<int32_t>(t.products - 2 * differing);
      if (t.totals) {
        t.totals[i * COLUMNS + o] = total;
      } else {
        const float value = static_cast<float>(total) * t.factor[o];
        t.out[i * t.out_step + o] = t.added ? value + t.added[o] : value;
      }
    }
  }
}

bool sign_scalar(const Floats& f, uint32_t* out, int64_t out_stride) {
  bool odd = false;
  for (int64_t p = 0; p < f.pixels; ++p, out += out_stride)
    for (int64_t c = 0; c < f.channels; c += WORD) {
      uint32_t word = 0;
      for (int64_t i = 0; i < WORD && c + i < f.channels; ++i) {
        const float value = value_at(f.x, f.dtype, p * f.pixel_stride + (c + i) * f.channel_stride);
        odd |= !std::isfinite(value);
        word |= static_cast<uint32_t>(!(value * f.inverse_scale < 0)) << i;
      }
      out[c / WORD] = word;
    }
  return odd;
}

void arrange_scalar(const uint8_t* row, int first, int64_t channels, int64_t taps, uint32_t* out) {
  const int64_t words = (channels + WORD - 1) / WORD;
  for (int64_t i = 0; i < taps * words; ++i) out[i * LANES] = 0;
  int64_t bit = first;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t, ++bit)
      out[(t * words + c / WORD) * LANES] |= static_cast<uint32_t>(row[bit / 8] >> bit % 8 & 1) << c % WORD;
}

}  // namespace binary
}  // namespace bitorch_engine
