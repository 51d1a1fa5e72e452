// Packed weights as floats, for the products that are torch's.
#include "bits/bits.h"
#include "qconv/qconv.h"
#include "quantize/quantize.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"
#include "runtime/watch.h"

using namespace bitorch_engine;

// The weights code * scale of a packed stream of rows, (channels, taps). out: rows (taps, channels), channels last.
BE_EXPORT void be_dequantize(const uint8_t* packed, int64_t rows, int64_t channels, int64_t taps, const float* scale,
                             int bits, float* out, int threads) {
  const float lowest = static_cast<float>(lowest_code(bits));
  const int64_t length = channels * taps;
  const bool turns = taps > 1 && channels > 1;
  // Short rows, and those that do not begin at a whole byte, are unpacked together.
  const int64_t some = std::max<int64_t>(length % 8 ? 8 : 1, 4096 / (length + 1) / 8 * 8);
  const auto split = split_kernel.pick();
  const auto floats = floats_kernel.pick();
  parallel_for(rows, round_up(1 + (1 << 14) / (length + 1), some), threads, [&](int64_t first, int64_t last) {
    const auto index = new_buffer<uint8_t>(some * length), turned = new_buffer<uint8_t>(turns ? length : 0);
    for (int64_t row = first; row < last; row += some) {
      const int64_t count = std::min(some, last - row);
      unpack_range(packed, row * length, count * length, bits, index.get());
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* values = index.get() + i * length;
        if (turns) {
          split(values, 1, channels, taps, turned.get());
          values = turned.get();
        }
        floats(values, length, bits, lowest, scale[row + i], out + (row + i) * length);
      }
    }
  });
}

// All that a call of be_dequantize reads; ops/cpu/quantize.py has the same fields.
struct PlannedDequantize {
  const uint8_t* packed;
  const float* scale;
  int64_t rows, channels, taps, bits, threads;
};

BE_EXPORT int be_dequantize_planned(const PlannedDequantize* p, const void*, void* out) {
  be_dequantize(p->packed, p->rows, p->channels, p->taps, p->scale, static_cast<int>(p->bits),
                static_cast<float*>(out), static_cast<int>(p->threads));
  return DONE;
}
