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

// Whether half of the values that are not 0 lie within the four upper powers of two: above a sixteenth of the largest.
inline bool is_even(const float* x, int64_t count, float largest) {
  constexpr uint32_t ONE = 1 << 23;  // least bits of a number that is not tiny
  uint32_t top;
  std::memcpy(&top, &largest, 4);
  const uint32_t exponent = top / ONE, bound = exponent > 4 ? (exponent - 3) * ONE : ONE;
  int values = 0, upper = 0;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t size;
    std::memcpy(&size, x + k, 4);
    size &= 0x7fffffff;
    values += size >= ONE;
    upper += size >= bound;
  }
  return 2 * upper >= values;
}

// The columns of a group that begins where `left` are left: so many vectors as these fill.
inline int64_t group_columns(int64_t left, int64_t vector) {
  return left < GROUP ? (left + vector - 1) / vector * vector : GROUP;
}

// Of four, as signed numbers.
inline int32_t sum_of_bytes(const int8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  const auto top = [](uint32_t x) { return static_cast<int32_t>(x) >> 24; };
  return top(word) + top(word << 8) + top(word << 16) + top(word << 24);
}

// A group of integers as digits. Returns where the next group's begin.
template <int64_t WIDTH, int64_t PER_BYTE>
int8_t* put_digits(const int32_t* q, int64_t count, int8_t* out, int32_t* corrections) {
  alignas(64) int8_t digits[3][GROUP];
  for (int64_t k = 0; k < count; ++k) {
    const int32_t above = (q[k] + 128) >> 8, high = (above + 128) >> 8;  // rounded, so that digits are signed
    digits[0][k] = static_cast<int8_t>(q[k] - above * 256);
    digits[1][k] = static_cast<int8_t>(above - high * 256);
    digits[2][k] = static_cast<int8_t>(high);
  }
  // Every lane is corrected by itself: what cancels must do so before it is rounded.
  int32_t sums[3][WIDTH / 4] = {};
  for (int64_t byte = 0; byte < count / PER_BYTE; byte += WIDTH)
    for (int64_t j = 0; j < PER_BYTE; ++j)
      for (int d = 0; d < 3; ++d, out += WIDTH) {
        for (int64_t i = 0; i < WIDTH; ++i) out[i] = digits[d][(byte + i) * PER_BYTE + j];
        for (int64_t i = 0; i < WIDTH / 4; ++i) sums[d][i] += sum_of_bytes(out + 4 * i);
      }
  const int32_t lowest = lowest_code(8 / PER_BYTE);
  std::memset(corrections, 0, 48 * sizeof(int32_t));
  for (int d = 0; d < 3; ++d)
    for (int64_t i = 0; i < WIDTH / 4; ++i) corrections[16 * d + i] = sums[d][i] * lowest;
  return out;
}

inline void put_scales(float scale, float* scales) {
  scales[0] = scale;
  scales[1] = scale * 256;
  scales[2] = scale * 65536;
}

template <int64_t WIDTH, int64_t PER_BYTE>
bool split_digits_of(const float* x, const Digits& to) {
  int8_t* out = to.digits;
  int32_t* corrections = to.corrections;
  float* scales = to.scales;
  float padded[GROUP];
  int32_t q[GROUP];
  for (int64_t first = 0; first < to.columns; first += GROUP, corrections += 48, scales += 3) {
    const float* values = x + first;
    const int64_t left = to.columns - first, count = group_columns(left, PER_BYTE * WIDTH);
    if (left < count) {
      std::memcpy(padded, values, left * sizeof(float));
      std::memset(padded + left, 0, (count - left) * sizeof(float));
      values = padded;
    }
    const float largest = largest_size(values, count);
    if (!(largest <= 3e38f) || (largest > 0 && largest < 1e-25f)) return false;
    if (!is_even(values, count, largest)) return false;
    const float inverse = largest > 0 ? LARGEST / largest : 0;
    put_scales(largest / LARGEST, scales);
    for (int64_t k = 0; k < count; ++k) {
      const float rounded = std::nearbyint(values[k] * inverse);
      q[k] = static_cast<int32_t>(rounded < -LARGEST ? -LARGEST : rounded > LARGEST ? LARGEST : rounded);
    }
    out = put_digits<WIDTH, PER_BYTE>(q, count, out, corrections);
  }
  return true;
}

template <int64_t WIDTH, int64_t PER_BYTE>
void split_bytes_of(const uint8_t* bytes, int zero, const Digits& to) {
  int8_t* out = to.digits;
  int32_t* corrections = to.corrections;
  float* scales = to.scales;
  int32_t q[GROUP];
  for (int64_t first = 0; first < to.columns; first += GROUP, corrections += 48, scales += 3) {
    const int64_t left = to.columns - first, count = group_columns(left, PER_BYTE * WIDTH);
    for (int64_t k = 0; k < count; ++k) q[k] = k < left ? bytes[first + k] - zero : 0;
    put_scales(1, scales);
    out = put_digits<WIDTH, PER_BYTE>(q, count, out, corrections);
  }
}

template <int64_t WIDTH>
bool split_digits(const float* x, int bits, const Digits& to) {
  return (bits == 1 ? split_digits_of<WIDTH, 8> : bits == 2 ? split_digits_of<WIDTH, 4> : split_digits_of<WIDTH, 2>)(x, to);
}

template <int64_t WIDTH>
void split_bytes(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  const auto split = bits == 1 ? split_bytes_of<WIDTH, 8> : bits == 2 ? split_bytes_of<WIDTH, 4> : split_bytes_of<WIDTH, 2>;
  split(bytes, zero, to);
}

}  // namespace
}  // namespace bitorch_engine
