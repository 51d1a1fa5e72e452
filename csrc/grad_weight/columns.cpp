// The weight's gradient from a float gradient: activations as the columns of a matrix (im2col), some result pixels at a
// time, which torch multiplies with the gradient.
#include <algorithm>
#include <cstring>

#include "grad_weight/grad_weight.h"
#include "runtime/geometry.h"
#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<WidenFunction> widen_kernel{
    "grad_weight.widen", {widen_scalar, BE_ARM(widen_neon), BE_X86(widen_avx2), BE_X86(widen_avx512)}};

namespace {

// What one result pixel reads, (taps, channels); 0 in the padding. copy(values, count, out) makes floats of values.
template <class Value, class Copy>
struct Columns {
  const Geometry& g;
  const Value* values;
  Copy copy;

  // A line of taps, of which the first reads at x in the line `line` of the activation.
  void fill_line(const Value* line, int64_t x, float* out) const {
    const int64_t channels = g.in_channels, taps = g.kernel[2], dilation = g.dilation[2];
    // Taps first .. last - 1 are inside.
    const int64_t first = std::min(taps, x >= 0 ? 0 : (-x + dilation - 1) / dilation);
    const int64_t last = std::max(first, x < g.in[2] ? std::min(taps, (g.in[2] - x + dilation - 1) / dilation) : 0);
    std::memset(out, 0, first * channels * sizeof(float));
    std::memset(out + last * channels, 0, (taps - last) * channels * sizeof(float));
    if (dilation == 1) return copy(line + (x + first) * channels, (last - first) * channels, out + first * channels);
    for (int64_t t = first; t < last; ++t) copy(line + (x + t * dilation) * channels, channels, out + t * channels);
  }

  void fill(int64_t pixel, float* out) const {
    const int64_t x = pixel % g.out[2], y = pixel / g.out[2] % g.out[1];
    const int64_t z = pixel / g.out[2] / g.out[1] % g.out[0], sample = pixel / g.out_pixels();
    const int64_t line_floats = g.kernel[2] * g.in_channels;
    for (int64_t i = 0; i < g.kernel[0]; ++i)
      for (int64_t j = 0; j < g.kernel[1]; ++j, out += line_floats) {
        const int64_t in_z = z * g.stride[0] - g.pad[0] + i * g.dilation[0];
        const int64_t in_y = y * g.stride[1] - g.pad[1] + j * g.dilation[1];
        if (in_z < 0 || in_z >= g.in[0] || in_y < 0 || in_y >= g.in[1]) {
          std::memset(out, 0, line_floats * sizeof(float));
          continue;
        }
        const int64_t line = (sample * g.in[0] + in_z) * g.in[1] + in_y;
        fill_line(values + line * g.in[2] * g.in_channels, x * g.stride[2] - g.pad[2], out);
      }
  }
};

template <class Value, class Copy>
void fill_columns(const Geometry& geometry, const Value* values, const Copy& copy, int64_t first, int64_t count,
                  float* out, int threads) {
  const Columns<Value, Copy> columns{geometry, values, copy};
  const int64_t row = geometry.taps() * geometry.in_channels;
  parallel_for(count, 1 + (1 << 14) / (row + 1), threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) columns.fill(first + i, out + i * row);
  });
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// geometry: of one group.  values: bytes (batch, pixels of geometry.in, channels).
// out: (count, taps, channels), values - zero, for result pixels first .. first + count - 1 of all samples.
BE_EXPORT void be_columns(const Geometry* geometry, const uint8_t* values, int zero, int64_t first, int64_t count,
                          float* out, int threads) {
  const WidenFunction widen = widen_kernel.pick();
  const auto copy = [=](const uint8_t* from, int64_t length, float* to) { widen(from, length, zero, to); };
  fill_columns(*geometry, values, copy, first, count, out, threads);
}

// The same of floats.
BE_EXPORT void be_float_columns(const Geometry* geometry, const float* values, int64_t first, int64_t count, float* out,
                                int threads) {
  const auto copy = [](const float* from, int64_t length, float* to) { std::memcpy(to, from, length * sizeof(float)); };
  fill_columns(*geometry, values, copy, first, count, out, threads);
}

// out: (rows, channels, taps), from (rows, taps, channels), times the factor.
BE_EXPORT void be_taps_last(const float* from, int64_t rows, int64_t taps, int64_t channels, float factor, float* out,
                            int threads) {
  const int64_t row = taps * channels;
  parallel_for(rows, 1 + (1 << 14) / (row + 1), threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = 0; c < channels; ++c) out[r * row + c * taps + t] = from[r * row + t * channels + c] * factor;
  });
}
