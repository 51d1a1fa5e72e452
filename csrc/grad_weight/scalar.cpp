#include "grad_weight/body.h"

namespace bitorch_engine {

void interleave_scalar(const uint8_t* image, const int64_t* bases, int64_t quads, int64_t channels, int center,
                       int8_t* out, int64_t block_bytes, int32_t* sums) {
  interleave(image, bases, quads, channels, center, out, block_bytes, sums);
}

void widen_scalar(const uint8_t* values, int64_t count, int zero, float* out) { widen(values, count, zero, out); }

}  // namespace bitorch_engine
