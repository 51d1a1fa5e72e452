#include "linear/linear.h"

#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<DotFunction> dot_kernel{"linear.dot", {dot_scalar, nullptr, nullptr, BE_X86(dot_avx512)}};

}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: (rows, columns).  packed: `channels` rows of `columns` codes, each of whole bytes.  bias: or null.
// out: (rows, channels).
BE_EXPORT void be_linear(const float* x, int64_t rows, const uint8_t* packed, const float* scale, const float* bias,
                         int64_t channels, int64_t columns, int bits, float* out, int threads) {
  const auto dot = dot_kernel.pick();
  parallel_for(channels, 1 + (1 << 16) / (columns + 1), threads, [=](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      for (int64_t r = 0; r < rows; ++r) {
        const float sum = dot(packed + c * (columns / 8 * bits), x + r * columns, columns, bits) * scale[c];
        out[r * channels + c] = bias ? sum + bias[c] : sum;
      }
  });
}
