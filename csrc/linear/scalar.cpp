#include "bits/bits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {

// Sixteen partial sums, as vectors have them: one alone would lose accuracy over thousands of products.
float dot_scalar(const uint8_t* packed, const float* x, int64_t count, int bits) {
  constexpr int64_t PIECE = 512;
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  uint8_t index[PIECE];
  float sums[16] = {};
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t some = count - start < PIECE ? count - start : PIECE;
    unpack_kernel.pick()(packed + start / 8 * bits, index, some, bits);
    for (int64_t k = 0; k < some; ++k) sums[k % 16] += static_cast<float>(index[k] * step + low) * x[start + k];
  }
  float sum = 0;
  for (float part : sums) sum += part;
  return sum;
}

}  // namespace bitorch_engine
