#include "quantize/quantize.h"

#include <atomic>
#include <limits>
#include <memory>

#include "bits/bits.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/transpose.h"

namespace bitorch_engine {

const Kernel<QuantizeActivationFunction> quantize_activation_kernel{
    "quantize_activation",
    {quantize_activation_scalar, nullptr, BE_X86(quantize_activation_avx2), BE_X86(quantize_activation_avx512)}};
const Kernel<FloatsFunction> floats_kernel{"floats", {floats_scalar, nullptr, BE_X86(floats_avx2)}};

}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (samples, pixels, channels) where channels_last, else (samples, channels, pixels).
// codes, beyond: packed, `bits` and one bit a value, in channels-last order.  poison: 0, or NaN where x is not finite.
BE_EXPORT void be_quantize_activation(const void* x, int dtype, int64_t samples, int64_t channels, int64_t pixels,
                                      int channels_last, const float* scale, const float* low, int bits, uint8_t* codes,
                                      uint8_t* beyond, float* poison, int threads) {
  const int64_t total = samples * channels * pixels, size = dtype == FLOAT32 ? 4 : 2;
  const std::unique_ptr<uint8_t[]> scratch(bits == 8 ? nullptr : new uint8_t[total]);
  const std::unique_ptr<uint8_t[]> outside(new uint8_t[total]);
  uint8_t* index = bits == 8 ? codes : scratch.get();
  const auto kernel = quantize_activation_kernel.pick();
  const ActivationRule rule{1.0f / *scale, *low, bits, 1};
  std::atomic<bool> odd{false};
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  if (channels_last) {
    parallel_for(total, 1 << 14, threads, [&](int64_t first, int64_t last) {
      if (kernel(bytes + first * size, static_cast<Dtype>(dtype), last - first, 1, 1, last - first, rule, index + first,
                 last - first, outside.get() + first))
        odd = true;
    });
  } else {
    const int64_t block = 64, blocks = (pixels + block - 1) / block;
    parallel_for(samples * blocks, 1 + (1 << 14) / (channels * block + 1), threads, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t sample = b / blocks, start = b % blocks * block, some = std::min(block, pixels - start);
        const int64_t to = (sample * pixels + start) * channels;
        if (kernel(bytes + (sample * channels * pixels + start) * size, static_cast<Dtype>(dtype), 1, pixels, some,
                   channels, rule, index + to, channels, outside.get() + to))
          odd = true;
      }
    });
  }
  if (bits != 8) be_pack(index, codes, total, bits, threads);
  be_pack(outside.get(), beyond, total, 1, threads);
  *poison = odd ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
}

// The values (index * step + low) * scale of a packed stream of codes in channels-last order.
// out: (samples, pixels, channels) where channels_last, else (samples, channels, pixels).
BE_EXPORT void be_activation_values(const uint8_t* codes, int64_t samples, int64_t channels, int64_t pixels,
                                    int channels_last, const float* scale, const float* low, int bits, float* out,
                                    int threads) {
  const auto convert = [=, floats = floats_kernel.pick()](const uint8_t* index, int64_t count, float* to) {
    floats(index, count, bits, *low, *scale, to);
  };
  if (channels_last) {
    parallel_for(samples * channels * pixels, 1 << 14, threads, [=](int64_t first, int64_t last) {
      uint8_t index[2048];
      for (int64_t start = first; start < last; start += 2048) {
        const int64_t some = std::min<int64_t>(2048, last - start);
        unpack_range(codes, start, some, bits, index);
        convert(index, some, out + start);
      }
    });
    return;
  }
  const int64_t block = 256, blocks = (pixels + block - 1) / block;
  parallel_for(samples * blocks, 1 + (1 << 14) / (channels * block + 1), threads, [=](int64_t first, int64_t last) {
    const Buffer<uint8_t> index = new_buffer<uint8_t>(block * channels), lines = new_buffer<uint8_t>(block * channels);
    for (int64_t b = first; b < last; ++b) {
      const int64_t sample = b / blocks, start = b % blocks * block, some = std::min(block, pixels - start);
      unpack_range(codes, (sample * pixels + start) * channels, some * channels, bits, index.get());
      transpose_bytes(index.get(), some, channels, channels, lines.get(), block);
      for (int64_t c = 0; c < channels; ++c)
        convert(lines.get() + c * block, some, out + (sample * channels + c) * pixels + start);
    }
  });
}
