// Activations as integers of three bytes, for vectors of WIDTH bytes. Included once per instruction set, so that the
// compiler uses its vectors.
#include <cmath>
#include <cstring>

#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

// Positive floats compare as their bits do, and what is not finite is above all numbers.
inline float largest_size(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t size;
    std::memcpy(&size, x + k, 4);
    size &= 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  float value;
  std::memcpy(&value, &largest, 4);
  return value;
}

inline uint32_t exponent_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 23 & 255;
}

// Whether half of the values that are not 0 lie within the four upper powers of two: above a sixteenth of the largest.
inline bool is_even(const float* x, int64_t count, float largest) {
  uint16_t counts[4][256] = {};  // by exponent; in turns, so that no addition waits for the one before
  for (int64_t k = 0; k < count; k += 4)
    for (int64_t i = 0; i < 4; ++i) ++counts[i][exponent_of(x[k + i])];
  const int top = static_cast<int>(exponent_of(largest));
  int values = static_cast<int>(count), upper = 0;
  for (int i = 0; i < 4; ++i) {
    values -= counts[i][0];
    for (int exponent = top; exponent > 0 && exponent > top - 4; --exponent) upper += counts[i][exponent];
  }
  return 2 * upper >= values;
}

template <int64_t WIDTH>
bool split_digits(const float* x, int bits, const Digits& to) {
  const int64_t per_byte = 8 / bits, vector = per_byte * WIDTH;
  int8_t* out = to.digits;
  int32_t* corrections = to.corrections;
  float* scales = to.scales;
  float padded[GROUP];
  int32_t q[GROUP];
  for (int64_t first = 0; first < to.columns; first += GROUP, corrections += 48, scales += 3) {
    const float* values = x + first;
    // Of the last group, so many vectors as it has columns for.
    const int64_t left = to.columns - first, count = left < GROUP ? (left + vector - 1) / vector * vector : GROUP;
    if (left < count) {
      std::memcpy(padded, values, left * sizeof(float));
      std::memset(padded + left, 0, (count - left) * sizeof(float));
      values = padded;
    }
    const float largest = largest_size(values, count);
    if (!(largest <= 3e38f) || (largest > 0 && largest < 1e-25f)) return false;
    if (!is_even(values, count, largest)) return false;
    const float inverse = largest > 0 ? LARGEST / largest : 0, scale = largest / LARGEST;
    scales[0] = scale;
    scales[1] = scale * 256;
    scales[2] = scale * 65536;
    for (int64_t k = 0; k < count; ++k) {
      const float rounded = std::nearbyint(values[k] * inverse);
      q[k] = static_cast<int32_t>(rounded < -LARGEST ? -LARGEST : rounded > LARGEST ? LARGEST : rounded);
    }
    int32_t sums[48] = {};
    for (int64_t v = 0; v < count / vector; ++v)
      for (int64_t j = 0; j < per_byte; ++j, out += 3 * WIDTH)
        for (int64_t i = 0; i < WIDTH; ++i) {
          const int32_t value = q[(v * WIDTH + i) * per_byte + j];
          const int32_t above = (value + 128) >> 8, high = (above + 128) >> 8;  // rounded, so that digits are signed
          const int32_t all[3] = {value - above * 256, above - high * 256, high};
          for (int d = 0; d < 3; ++d) {
            out[d * WIDTH + i] = static_cast<int8_t>(all[d]);
            sums[16 * d + i / 4] += all[d];
          }
        }
    for (int i = 0; i < 48; ++i) corrections[i] = sums[i] * lowest_code(bits);
  }
  return true;
}

}  // namespace
}  // namespace bitorch_engine
