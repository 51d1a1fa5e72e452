// The weight's gradient is, for every tap, a matrix product over the pixels p of all samples:
//
//     total[a, b] = sum over p of row[a, p] * column[b, p at the tap]
//
//            rows a                columns b, from the padded image
//   plain         gradient's channels   activation's channels
//   transposed    activation's          gradient's
//
// Both are bytes with a zero point; A = row (unsigned) and B = column - center (signed) go through the engine's kernel,
// where center is the middle of what a column's bytes can be:
//
//     total = sum A B - zero_row * sum B + (center - zero_column) * (sum A - zero_row * pixels)
#include "grad_weight/grad_weight.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "bits/bits.h"
#include "qconv/image.h"
#include "qconv/product.h"
#include "qconv/qconv.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"
#include "runtime/transpose.h"
#include "winograd/gradient.h"

namespace bitorch_engine {

const Kernel<InterleaveFunction> interleave_kernel{
    "grad_weight.interleave",
    {interleave_scalar, BE_ARM(interleave_neon), BE_X86(interleave_avx2), BE_X86(interleave_avx512)}};

namespace {

// Rows that are multiplied together should stay near: processors without AVX-512 have smaller caches.
int64_t row_bytes() { return current_isa() < AVX512 ? 1 << 17 : 1 << 21; }

// Pixels first .. first + n - 1 of all samples: where their bases are in the image.
void locate(const Product& p, int64_t first, int64_t n, int64_t* bases) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t pixel = first + i, x = pixel % p.result[2], y = pixel / p.result[2] % p.result[1];
    const int64_t z = pixel / p.result[2] / p.result[1] % p.result[0], sample = pixel / p.result_pixels();
    const int64_t at[3] = {z * p.base_step[0] + p.before[0], y * p.base_step[1] + p.before[1],
                           x * p.base_step[2] + p.before[2]};
    bases[i] = (((sample * p.padded[0] + at[0]) * p.padded[1] + at[1]) * p.padded[2] + at[2]) * p.pixel_bytes();
  }
}

// Pixels x channels bytes to channels x pixels, and the sum of each row; `flip` is added to each byte without sign: 128
// for signed ones.
void turn(const uint8_t* from, int64_t pixels, int64_t stride, int64_t channels, uint8_t flip, uint8_t* to,
          int64_t pitch, int64_t* sums) {
  transpose_bytes(from, pixels, channels, stride, to, pitch);
  for (int64_t c = 0; c < channels; ++c) {
    uint8_t* row = to + c * pitch;
    int32_t sum = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      row[p] ^= flip;
      sum += row[p];
    }
    sums[c] = sum;
  }
}

// One row of the gradient, from (taps, channels) to (channels, taps), times one factor a channel or one for all.
template <class Value>
void finish_row(const Value* from, int64_t taps, int64_t channels, const float* scale, int64_t scale_step, float* out) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t b = 0; b < channels; ++b)
      out[b * taps + t] = static_cast<float>(from[t * channels + b]) * scale[b * scale_step];
}

// The gradient, from totals (row, tap, column).
template <class Value>
void finish(const Product& p, const Value* totals, bool rows_are_gradient, const float* scale, float* out,
            int threads) {
  const int64_t row_totals = p.taps * p.image_channels;
  parallel_for(p.groups * p.result_channels, 1 + (1 << 14) / row_totals, threads, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const float* factor = scale + (rows_are_gradient ? row : row / p.result_channels * p.image_channels);
      finish_row(totals + row * row_totals, p.taps, p.image_channels, factor, !rows_are_gradient,
                 out + row * row_totals);
    }
  });
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// geometry: of the plain convolution (of the transposed one: from its output to its input).  rows: bytes (batch, pixels
// of geometry.out, channels): signed gradient codes where rows_are_gradient, else indices of activations (at 1 bit
// twice the index).  columns: the other side, as Image takes it, of geometry.in.  low, bits: of the activation.
// scale: one a gradient channel.  out: (row channels, column channels / groups, taps) float.
BE_EXPORT void be_grad_weight(const Geometry* geometry, int rows_are_gradient, const uint8_t* rows, const void* columns,
                              float low, int bits, const float* scale, float* out, int threads) {
  const Product p(*geometry, false, true);
  const int64_t no_steps[3] = {};
  const Image image(p, rows_are_gradient ? SourceKind::CODES : SourceKind::GRADIENT, columns, FLOAT32, 0, 0, no_steps,
                    bits, 1.0f, low, threads);
  if (rows_are_gradient && winograd::suits_gradient(p, image.largest())) {
    const Buffer<int32_t> totals = new_buffer<int32_t>(p.groups * p.result_channels * p.taps * p.image_channels);
    winograd::sum_gradient(p, image.bytes(), image.zero(), reinterpret_cast<const int8_t*>(rows), totals.get(),
                           threads);
    return finish(p, totals.get(), true, scale, out, threads);
  }
  const int64_t activation_zero = bits == 1 ? 1 : static_cast<int64_t>(-low);
  const int64_t activation_most = bits == 1 ? 2 : (1 << bits) - 1;
  const int64_t row_zero = rows_are_gradient ? 128 : activation_zero, column_zero = image.zero();
  const int64_t row_most = rows_are_gradient ? 255 : activation_most, center = (image.largest() + 1) / 2;
  const int64_t row_channels = p.result_channels, column_channels = p.image_channels, taps = p.taps;
  const int64_t all_rows = p.groups * row_channels, pixels = p.batch * p.result_pixels();
  const Phase& phase = p.phases[0];
  const Buffer<int64_t> offsets = new_buffer<int64_t>(taps);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t* shift = phase.taps[t].shift;
    offsets[t] = ((shift[0] * p.padded[1] + shift[1]) * p.padded[2] + shift[2]) * p.pixel_bytes();
  }
  // At most 2**14 pixels: three sums of as many times 255 * 128 fit 32 bits.
  const int64_t most = std::min<int64_t>(1 << 14, round_up(std::max<int64_t>(1024, row_bytes() / all_rows), 64));
  const int64_t chunk = std::min(most, round_up(pixels, 64)), strips = (column_channels + LANES - 1) / LANES;
  const int64_t pitch = chunk + 64;  // not a power of two, at which all rows would share one set of the cache
  const bool once = pixels <= chunk;
  // Totals, (row, tap, column): in 32 bits where one chunk is all.
  const int64_t row_totals = taps * column_channels, weights = all_rows * row_totals;
  const Buffer<int32_t> small = new_buffer<int32_t>(once ? weights : 0);
  const Buffer<int64_t> large = new_buffer<int64_t>(once ? 0 : weights);
  if (!once) std::memset(large.get(), 0, weights * sizeof(int64_t));
  const Buffer<uint8_t> turned = new_buffer<uint8_t>(all_rows * pitch);
  const Buffer<int64_t> row_sums = new_buffer<int64_t>(all_rows), bases = new_buffer<int64_t>(chunk);
  const auto interleave = interleave_kernel.pick();
  const auto multiply = multiply_kernel.pick();

  for (int64_t first = 0; first < pixels; first += chunk) {
    const int64_t count = std::min(chunk, pixels - first), depth = round_up(count, 64);
    locate(p, first, count, bases.get());
    for (int64_t i = count; i < depth; ++i) bases[i] = bases[count - 1];
    parallel_for(all_rows, 64, threads, [&](int64_t from, int64_t to) {
      turn(rows + first * all_rows + from, count, all_rows, to - from, rows_are_gradient ? 0x80 : 0,
           turned.get() + from * pitch, pitch, row_sums.get() + from);
      for (int64_t r = from; r < to; ++r) std::memset(turned.get() + r * pitch + count, 0, depth - count);
    });
    parallel_for(p.groups * taps * strips, 1, threads, [&](int64_t from, int64_t to) {
      const Buffer<int8_t> panel = new_buffer<int8_t>(LANES * depth);
      alignas(64) int32_t totals[ROWS * COLUMNS];
      const uint8_t* at[ROWS];
      uint8_t runs[ROWS / 16 + 1];
      const Read all{0, 0};
      Setup setup;
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t strip = unit % strips, tap = unit / strips % taps, group = unit / strips / taps;
        const int64_t columns_here = std::min(LANES, column_channels - strip * LANES);
        const uint8_t* start = image.bytes() + group * p.image_depth + strip * LANES + offsets[tap];
        int32_t column_sums[LANES] = {};
        interleave(start, bases.get(), depth / 4, columns_here, static_cast<int>(center), panel.get(), 16 * depth,
                   column_sums);
        for (int64_t i = count; i < depth; ++i)  // what fills up the last step of 64 is not summed
          for (int64_t b = 0; b < columns_here; ++b)
            column_sums[b] -= start[bases[i] + b] - static_cast<int32_t>(center);
        for (int32_t& sum : column_sums) sum *= static_cast<int32_t>(row_zero);
        for (int64_t r0 = 0; r0 < row_channels; r0 += ROWS) {
          const int64_t here = std::min(ROWS, row_channels - r0);
          int64_t run_count = 0;
          for (int64_t r = 0; r < here; ++r) at[r] = turned.get() + (group * row_channels + r0 + r) * pitch;
          for (int64_t r = 0; r < here; r += 16)
            runs[run_count++] = static_cast<uint8_t>(std::min<int64_t>(16, here - r));
          multiply({at, here, &all, 1, depth, panel.get(), 16 * depth, (columns_here + 15) / 16, totals, runs,
                    run_count, pairs_that_fit(row_most, center), nullptr, &setup});
          for (int64_t r = 0; r < here; ++r) {
            const int64_t row = group * row_channels + r0 + r;
            const int32_t of_row = static_cast<int32_t>((center - column_zero) * (row_sums[row] - row_zero * count));
            const int64_t place = row * row_totals + tap * column_channels + strip * LANES;
            const int32_t* of_columns = totals + r * COLUMNS;
            if (once)
              for (int64_t b = 0; b < columns_here; ++b) small[place + b] = of_columns[b] - column_sums[b] + of_row;
            else
              for (int64_t b = 0; b < columns_here; ++b) large[place + b] += of_columns[b] - column_sums[b] + of_row;
          }
        }
      }
    });
  }
  if (once) finish(p, small.get(), rows_are_gradient, scale, out, threads);
  else finish(p, large.get(), rows_are_gradient, scale, out, threads);
}
