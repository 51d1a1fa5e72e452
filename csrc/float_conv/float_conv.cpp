#include "float_conv/float_conv.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bits/bits.h"
#include "qconv/qconv.h"
#include "runtime/buffer.h"
#include "runtime/geometry.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"
#include "runtime/transpose.h"

namespace bitorch_engine {

const Kernel<MultiplyLineFunction> multiply_line_kernel{
    "float_conv.multiply_line",
    {multiply_line_scalar, nullptr, BE_X86(multiply_line_avx2), BE_X86(multiply_line_avx512)}};

namespace {

constexpr int64_t WORK = 1 << 18;  // products that a thread takes at least

// All that a call reads but x; ops/cpu/float_conv.py has the same fields. One group of channels, and float32.
struct PlannedFloatConv {
  Geometry geometry;
  const uint8_t* packed;
  const float *scale, *bias;  // one a channel; bias: or null
  int64_t bits, channels_last, threads;
};

// The weights as floats, in the kernel's order, and what sums start with.
struct Weights {
  Buffer<float> values, start;

  explicit Weights(const PlannedFloatConv& p) {
    const int64_t channels = p.geometry.out_channels, depth = p.geometry.in_channels * p.geometry.taps();
    const int64_t padded = round_up(channels, FLOAT_BLOCK);
    values = new_buffer<float>(padded * depth);
    start = new_buffer<float>(padded);
    std::fill_n(start.get(), padded, 0.0f);
    if (p.bias) std::copy_n(p.bias, channels, start.get());
    const auto rows = new_buffer<uint8_t>(FLOAT_BLOCK * depth), columns = new_buffer<uint8_t>(FLOAT_BLOCK * depth);
    for (int64_t first = 0; first < channels; first += FLOAT_BLOCK) {
      const int64_t present = std::min(FLOAT_BLOCK, channels - first);
      unpack_range(p.packed, first * depth, present * depth, static_cast<int>(p.bits), rows.get());
      float* to = values.get() + first * depth;
      if (p.channels_last) {
        float scale[FLOAT_BLOCK] = {};
        std::copy_n(p.scale + first, present, scale);
        std::memset(rows.get() + present * depth, 0, (FLOAT_BLOCK - present) * depth);
        transpose_bytes(rows.get(), FLOAT_BLOCK, depth, depth, columns.get(), FLOAT_BLOCK);
        for (int64_t k = 0; k < depth; ++k, to += FLOAT_BLOCK)
          for (int64_t o = 0; o < FLOAT_BLOCK; ++o) to[o] = value(columns[k * FLOAT_BLOCK + o], p.bits, scale[o]);
      } else {
        for (int64_t o = 0; o < present; ++o, to += depth)
          for (int64_t k = 0; k < depth; ++k) to[k] = value(rows[o * depth + k], p.bits, p.scale[first + o]);
      }
    }
  }

  static float value(uint8_t index, int64_t bits, float scale) {
    return static_cast<float>(static_cast<int>(index) * (bits == 1 ? 2 : 1) + lowest_code(static_cast<int>(bits))) *
           scale;
  }
};

// Lines of an image, each copied between zeros when it is first asked for and kept while the results of some lines
// around it need it: those that are needed together have a place each.
class Lines {
 public:
  Lines(const Geometry& g, bool channels_last, const float* x)
      : g_(g),
        channels_last_(channels_last),
        x_(x),
        pixels_((g.out[2] - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1),
        phase_((pixels_ + g.stride[2] - 1) / g.stride[2]),
        pitch_(round_up(g.in_channels * (channels_last ? pixels_ : phase_ * g.stride[2]), 16)),
        planes_(std::min(g.in[0], (g.kernel[0] - 1) * g.dilation[0] + 1)),
        rows_(std::min(g.in[1], (g.kernel[1] - 1) * g.dilation[1] + 1)),
        kept_(planes_ * rows_, -1) {
    const int64_t count = (planes_ * rows_ + 1) * pitch_ + FLOAT_BLOCK;
    memory_ = new_buffer<float>(count);
    std::fill_n(memory_.get(), count, 0.0f);
  }

  // z, y: may lie outside of the image.
  const float* at(int64_t sample, int64_t z, int64_t y) {
    if (z < 0 || z >= g_.in[0] || y < 0 || y >= g_.in[1]) return memory_.get() + planes_ * rows_ * pitch_;
    const int64_t line = (sample * g_.in[0] + z) * g_.in[1] + y, place = z % planes_ * rows_ + y % rows_;
    float* to = memory_.get() + place * pitch_;
    if (kept_[place] != line) {
      kept_[place] = line;
      copy(sample, z * g_.in[1] + y, to);
    }
    return to;
  }

  // Where pixel x of the padded line is, for a result every stride[2] pixels from there on.
  int64_t offset(int64_t x, int64_t channel) const {
    if (channels_last_) return x * g_.in_channels + channel;
    return (channel * g_.stride[2] + x % g_.stride[2]) * phase_ + x / g_.stride[2];
  }

 private:
  void copy(int64_t sample, int64_t line, float* to) const {
    const int64_t channels = g_.in_channels, width = g_.in[2], pad = g_.pad[2], stride = g_.stride[2];
    const int64_t present = std::min(width, pixels_ - pad);
    if (channels_last_) {
      const float* from = x_ + (sample * g_.in_pixels() + line * width) * channels;
      if (present > 0) std::memcpy(to + pad * channels, from, present * channels * sizeof(float));
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = x_ + (sample * channels + c) * g_.in_pixels() + line * width;
      for (int64_t phase = 0; phase < stride; ++phase) {
        // The first of the image's pixels in this phase.
        const int64_t first = (phase + stride - pad % stride) % stride;
        float* put = to + offset(pad + first, c);
        for (int64_t x = first; x < present; x += stride) *put++ = from[x];
      }
    }
  }

  const Geometry& g_;
  bool channels_last_;
  const float* x_;
  int64_t pixels_, phase_, pitch_, planes_, rows_;
  std::vector<int64_t> kept_;
  Buffer<float> memory_;
};

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (batch, *in, in_channels) or (batch, in_channels, *in).  out: likewise.  What is not finite is not noticed.
BE_EXPORT int be_float_conv_planned(const PlannedFloatConv* p, const void* x, void* out) {
  const Geometry& g = p->geometry;
  const bool last = p->channels_last;
  const int64_t width = g.kernel[2];
  const Weights weights(*p);
  const int64_t channels = g.in_channels, taps = g.taps(), depth = channels * taps, per_sample = g.out[0] * g.out[1];
  const auto multiply = multiply_line_kernel.pick();
  const int64_t grain = 1 + WORK / (g.out[2] * g.out_channels * depth);
  parallel_for(g.batch * per_sample, grain, static_cast<int>(p->threads), [&](int64_t first, int64_t past) {
    Lines image(g, last, static_cast<const float*>(x));
    std::vector<const float*> values(depth);
    std::vector<int64_t> offsets(channels * width);
    for (int64_t i = 0; i < channels * width; ++i) offsets[i] = image.offset(i % width * g.dilation[2], i / width);
    ConvLine line{last, values.data(), depth, last ? g.stride[2] * channels : 1, g.out[2], weights.values.get(),
                  weights.start.get(), g.out_channels, nullptr, last ? g.out_channels : g.out_pixels()};
    for (int64_t i = first; i < past; ++i) {
      const int64_t sample = i / per_sample, inside = i % per_sample;
      const int64_t z = inside / g.out[1] * g.stride[0] - g.pad[0], y = inside % g.out[1] * g.stride[1] - g.pad[1];
      for (int64_t row = 0; row < taps / width; ++row) {
        const float* from =
            image.at(sample, z + row / g.kernel[1] * g.dilation[0], y + row % g.kernel[1] * g.dilation[1]);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < width; ++k) values[c * taps + row * width + k] = from + offsets[c * width + k];
      }
      line.out = static_cast<float*>(out) + sample * g.out_channels * g.out_pixels() +
                 inside * g.out[2] * (last ? g.out_channels : 1);
      multiply(line);
    }
  });
  return DONE;
}
