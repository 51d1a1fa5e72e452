#include "gradient/gradient.h"

#include <memory>

#include "bits/bits.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/transpose.h"

namespace bitorch_engine {

#define BE_ROW(name) \
  { name##_scalar, BE_ARM(name##_neon), BE_X86(name##_avx2), BE_X86(name##_avx512) }
const Kernel<LargestByColumnFunction> largest_by_column_kernel{"gradient.largest_by_column", BE_ROW(largest_by_column)};
const Kernel<LargestFunction> largest_kernel{"gradient.largest", BE_ROW(largest)};
const Kernel<RoundFunction> round_kernel{"gradient.round", BE_ROW(round)};
const Kernel<StraightThroughFunction> straight_through_kernel{"gradient.straight_through", BE_ROW(straight_through)};
#undef BE_ROW

namespace {

constexpr int64_t PIXELS = 256;  // of a plane that are put in channels-last order, or taken out of it, at a time

int64_t lines_per_thread(int64_t length) { return 1 + (1 << 14) / (length + 1); }

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (samples, pixels, channels) where channels_last, else (samples, channels, pixels).  largest: (samples, channels).
BE_EXPORT void be_gradient_largest(const float* x, int64_t samples, int64_t channels, int64_t pixels, int channels_last,
                                   float* largest, int threads) {
  if (channels_last) {
    const auto kernel = largest_by_column_kernel.pick();
    parallel_for(samples, lines_per_thread(channels * pixels), threads, [=](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        std::fill(largest + s * channels, largest + (s + 1) * channels, 0.0f);
        kernel(x + s * pixels * channels, pixels, channels, largest + s * channels);
      }
    });
  } else {
    const auto kernel = largest_kernel.pick();
    parallel_for(samples * channels, lines_per_thread(pixels), threads, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) largest[i] = kernel(x + i * pixels, pixels);
    });
  }
}

// x as above.  factor: (channels,) or null.  inverse: (samples,), or (channels,) where by_channel.
// codes: (samples, pixels, channels).
BE_EXPORT void be_gradient_round(const float* x, int64_t samples, int64_t channels, int64_t pixels, int channels_last,
                                 const float* factor, const float* inverse, int by_channel, int limit, uint32_t seed,
                                 int8_t* codes, int threads) {
  const auto kernel = round_kernel.pick();
  if (channels_last) {
    parallel_for(samples * pixels, lines_per_thread(channels), threads, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t sample = i / pixels;
        const Rounding rounding{factor, 1, by_channel ? inverse : inverse + sample, by_channel ? 1 : 0,
                                static_cast<float>(limit), seed};
        const uint64_t index = static_cast<uint64_t>(sample * channels * pixels + i % pixels);
        kernel(x + i * channels, channels, rounding, index, static_cast<uint64_t>(pixels), codes + i * channels);
      }
    });
    return;
  }
  const int64_t blocks = (pixels + PIXELS - 1) / PIXELS;
  parallel_for(samples * blocks, lines_per_thread(channels * PIXELS), threads, [=](int64_t first, int64_t last) {
    constexpr int64_t LINES = 16;
    uint8_t lines[LINES * PIXELS];
    for (int64_t b = first; b < last; ++b) {
      const int64_t sample = b / blocks, start = b % blocks * PIXELS, some = std::min(PIXELS, pixels - start);
      uint8_t* to = reinterpret_cast<uint8_t*>(codes) + (sample * pixels + start) * channels;
      for (int64_t c0 = 0; c0 < channels; c0 += LINES) {
        const int64_t deep = std::min(LINES, channels - c0);
        for (int64_t c = c0; c < c0 + deep; ++c) {
          const int64_t index = (sample * channels + c) * pixels + start;
          const Rounding rounding{factor ? factor + c : nullptr, 0, inverse + (by_channel ? c : sample), 0,
                                  static_cast<float>(limit), seed};
          kernel(x + index, some, rounding, static_cast<uint64_t>(index), 1,
                 reinterpret_cast<int8_t*>(lines + (c - c0) * PIXELS));
        }
        transpose_bytes(lines, deep, some, PIXELS, to + c0, channels);
      }
    }
  });
}

// grad, out: as x above.  codes, beyond: packed streams in channels-last order.  Returns the sum of grad * slope, which
// does not depend on the number of threads.
BE_EXPORT double be_straight_through(const float* grad, int64_t samples, int64_t channels, int64_t pixels,
                                     int channels_last, const uint8_t* codes, const uint8_t* beyond, float low,
                                     int bits, float* out, int threads) {
  const auto kernel = straight_through_kernel.pick();
  if (channels_last) {
    constexpr int64_t piece = 2048;
    const int64_t total = samples * channels * pixels, pieces = (total + piece - 1) / piece;
    const std::unique_ptr<double[]> sums(new double[pieces]);
    parallel_for(pieces, 16, threads, [&](int64_t first, int64_t last) {
      uint8_t index[piece], outside[piece];
      for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * piece, some = std::min(piece, total - start);
        unpack_range(codes, start, some, bits, index);
        unpack_range(beyond, start, some, 1, outside);
        sums[b] = kernel(grad + start, index, outside, some, low, bits, out + start);
      }
    });
    double sum = 0;
    for (int64_t b = 0; b < pieces; ++b) sum += sums[b];
    return sum;
  }
  const int64_t blocks = (pixels + PIXELS - 1) / PIXELS;
  const std::unique_ptr<double[]> sums(new double[samples * blocks]);
  parallel_for(samples * blocks, lines_per_thread(channels * PIXELS), threads, [&](int64_t first, int64_t last) {
    const Buffer<uint8_t> values = new_buffer<uint8_t>(PIXELS * channels),
                          index = new_buffer<uint8_t>(PIXELS * channels),
                          outside = new_buffer<uint8_t>(PIXELS * channels);
    for (int64_t b = first; b < last; ++b) {
      const int64_t sample = b / blocks, start = b % blocks * PIXELS, some = std::min(PIXELS, pixels - start);
      unpack_range(codes, (sample * pixels + start) * channels, some * channels, bits, values.get());
      transpose_bytes(values.get(), some, channels, channels, index.get(), PIXELS);
      unpack_range(beyond, (sample * pixels + start) * channels, some * channels, 1, values.get());
      transpose_bytes(values.get(), some, channels, channels, outside.get(), PIXELS);
      sums[b] = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t place = (sample * channels + c) * pixels + start;
        sums[b] +=
            kernel(grad + place, index.get() + c * PIXELS, outside.get() + c * PIXELS, some, low, bits, out + place);
      }
    }
  });
  double sum = 0;
  for (int64_t b = 0; b < samples * blocks; ++b) sum += sums[b];
  return sum;
}
