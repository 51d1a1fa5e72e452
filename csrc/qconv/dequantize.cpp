// Packed weights as floats, for the products that are torch's.
#include "bits/bits.h"
#include "qconv/qconv.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"

using namespace bitorch_engine;

// The weights code * scale of a packed stream of rows, (channels, taps). out: rows (taps, channels), channels last.
BE_EXPORT void be_dequantize(const uint8_t* packed, int64_t rows, int64_t channels, int64_t taps, const float* scale,
                             int bits, float* out, int threads) {
  const int step = bits == 1 ? 2 : 1, lowest = lowest_code(bits);
  const int64_t length = channels * taps;
  const auto split = split_kernel.pick();
  parallel_for(rows, 1 + (1 << 14) / (length + 1), threads, [&](int64_t first, int64_t last) {
    const auto index = new_buffer<uint8_t>(length), turned = new_buffer<uint8_t>(taps > 1 ? length : 0);
    const uint8_t* const values = taps > 1 ? turned.get() : index.get();
    for (int64_t row = first; row < last; ++row) {
      unpack_range(packed, row * length, length, bits, index.get());
      if (taps > 1) split(index.get(), 1, channels, taps, turned.get());
      const float factor = scale[row];
      float* to = out + row * length;
      for (int64_t i = 0; i < length; ++i)
        to[i] = static_cast<float>(static_cast<int>(values[i]) * step + lowest) * factor;
    }
  });
}
