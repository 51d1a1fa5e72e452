#include "float_conv/float_conv.h"

namespace bitorch_engine {

void multiply_line_scalar(const ConvLine& l) {
  for (int64_t o = 0; o < l.channels; ++o) {
    const int64_t block = o / FLOAT_BLOCK * FLOAT_BLOCK, step = l.channels_last ? FLOAT_BLOCK : 1;
    const float* weights = l.weights + (l.channels_last ? block * l.depth + o - block : o * l.depth);
    for (int64_t x = 0; x < l.pixels; ++x) {
      float sum = l.start[o];
      for (int64_t k = 0; k < l.depth; ++k) sum += l.values[k][x * l.step] * weights[k * step];
      l.out[l.channels_last ? x * l.pitch + o : o * l.pitch + x] = sum;
    }
  }
}

}  // namespace bitorch_engine
