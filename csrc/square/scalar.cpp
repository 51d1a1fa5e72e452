#include "square/square.h"

namespace bitorch_engine {
namespace {

// Where a lane of a pixel is in a line of `pixels`.
int64_t place(int64_t pixels, int64_t x, int64_t lane) {
  return lane / LANE_BLOCK * LANE_BLOCK * pixels + x / 2 * 64 + place_in_pair(lane % LANE_BLOCK) + x % 2;
}

}  // namespace

void square_scalar(const SquareLine& l) {
  for (int64_t x = 0; x < l.pixels; ++x)
    for (int64_t o = 0; o < l.channels; ++o) {
      const int8_t* weights = l.weights + o / LANE_BLOCK * SQUARE_BYTES + place_in_pair(o % LANE_BLOCK);
      int32_t total = l.start[o];
      for (int64_t k = 0; k < 9; ++k)
        total += l.rows[k / 3][place(l.block_step / LANE_BLOCK, (l.strided ? 2 * x : x) + k % 3, o)] *
                 weights[k / 3 * SQUARE_ROW + PLACES_OF_TAP[k % 3][0]];
      const float value = static_cast<float>(total) * l.factor[o];
      l.out[x * l.pitch + o] = l.bias ? value + l.bias[o] : value;
    }
}

void pair_pixels_scalar(const uint8_t* line, int64_t pixels, int64_t lanes, uint8_t* pairs) {
  for (int64_t x = 0; x < pixels; ++x)
    for (int64_t o = 0; o < lanes; ++o) pairs[place(pixels, x, o)] = line[x * lanes + o];
}

bool quantize_pairs_scalar(const FloatLine& l, ActivationRule rule, uint8_t* pairs) {
  bool odd = false;
  for (int64_t x = 0; x < l.padded; ++x)
    for (int64_t c = 0; c < l.channels; ++c) {
      const bool inside = l.before <= x && x < l.before + l.pixels;
      const float value = inside ? l.x[(x - l.before) * l.pixel_stride + c] : 0.0f;
      odd |= quantize_activation_scalar(&value, FLOAT32, 1, 1, 1, 1, rule, pairs + place(l.padded, x, c), 1, nullptr);
    }
  return odd;
}

}  // namespace bitorch_engine
