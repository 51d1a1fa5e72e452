#include "gradient/body.h"

namespace bitorch_engine {

void largest_by_column_avx2(const float* x, int64_t rows, int64_t columns, float* found) {
  largest_by_column(x, rows, columns, found);
}

float largest_avx2(const float* x, int64_t count) { return largest(x, count); }

void round_avx2(const float* x, int64_t count, const Rounding& rounding, uint64_t first, uint64_t stride,
            int8_t* codes) {
  round(x, count, rounding, first, stride, codes);
}

double straight_through_avx2(const float* grad, const uint8_t* index, const uint8_t* beyond, int64_t count, float low,
                         int bits, float* out) {
  return straight_through(grad, index, beyond, count, low, bits, out);
}

}  // namespace bitorch_engine
