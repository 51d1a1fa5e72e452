// Activations as integers of some bytes, for vectors of WIDTH bytes whose sums are numbers of type Lane. Included once
// per instruction set, so that the compiler uses its vectors.
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

// Whether half of the values that are not 0 lie within so many upper powers of two: of 4, above a sixteenth of the
// largest.
inline bool is_even(const float* x, int64_t count, float largest, uint32_t powers) {
  constexpr uint32_t ONE = 1 << 23;  // least bits of a number that is not tiny
  uint32_t top;
  std::memcpy(&top, &largest, 4);
  const uint32_t exponent = top / ONE, bound = exponent > powers ? (exponent - powers + 1) * ONE : ONE;
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

// The digits of a piece in the order of its vectors, and their corrections. Returns where the next piece's begin, or
// null where a lane is too short for the sum, which is the largest where all digits are -128 and all weights the
// lowest.
template <class Lane, int64_t WIDTH, int64_t PER_BYTE, int DIGITS>
int8_t* put_piece(const int8_t (&digits)[DIGITS][GROUP], int64_t first, int64_t count, int8_t* out,
                  uint8_t* corrections) {
  typedef Lane Vector __attribute__((vector_size(WIDTH)));
  constexpr int LANES = WIDTH / sizeof(Lane), TOP = 8 * sizeof(Lane) - 8;
  const int8_t* placed = out;
  for (int64_t byte = 0; byte < count / PER_BYTE; byte += WIDTH)
    for (int64_t j = 0; j < PER_BYTE; ++j)
      for (int d = 0; d < DIGITS; ++d, out += WIDTH)
        for (int64_t i = 0; i < WIDTH; ++i) out[i] = digits[d][first + (byte + i) * PER_BYTE + j];
  // Every lane is corrected by itself: what cancels must do so before it is rounded.
  Vector sums[DIGITS] = {};
  while (placed < out)
    for (int d = 0; d < DIGITS; ++d, placed += WIDTH) {
      Vector bytes;
      std::memcpy(&bytes, placed, WIDTH);
      for (int left = TOP; left >= 0; left -= 8) sums[d] += bytes << left >> TOP;
    }
  const int32_t lowest = lowest_code(8 / PER_BYTE);
  bool fits = true;
  for (int d = 0; d < DIGITS; ++d) {
    for (int64_t i = 0; i < LANES; ++i) {
      const int32_t correction = sums[d][i] * lowest;
      sums[d][i] = static_cast<Lane>(correction);
      fits &= sums[d][i] == correction;
    }
    std::memcpy(corrections + d * WIDTH, &sums[d], WIDTH);
  }
  return fits ? out : nullptr;
}

// Those of a group, whose first piece puts its own to `out` and `corrections`; both go on to the next group's.
template <class Lane, int64_t WIDTH, int64_t PER_BYTE, int DIGITS>
void put_group(const int8_t (&digits)[DIGITS][GROUP], int64_t count, int64_t piece, int8_t*& out,
               uint8_t*& corrections) {
  for (int64_t first = 0; first < count && out; first += piece, corrections += DIGITS * WIDTH) {
    const int64_t some = count - first < piece ? count - first : piece;
    out = put_piece<Lane, WIDTH, PER_BYTE>(digits, first, some, out, corrections);
  }
}

template <class Lane, int64_t WIDTH, int64_t PER_BYTE, int DIGITS>
bool split_floats_of(const float* x, const Digits& to) {
  constexpr int32_t LARGEST = DIGITS == 4 ? 0x7f7f7f00 : 0x7f7f7f >> 8 * (3 - DIGITS);  // its digits fit, as a float
  const int64_t piece = piece_columns(to.group, 8 / PER_BYTE, WIDTH);
  int8_t* out = to.digits;
  uint8_t* corrections = to.corrections;
  float* scales = to.scales;
  float padded[GROUP];
  int32_t q[GROUP];
  alignas(64) int8_t digits[DIGITS][GROUP];
  for (int64_t first = 0; first < to.columns && out; first += GROUP, scales += DIGITS) {
    const float* values = x + first;
    const int64_t left = to.columns - first, count = group_columns(left, PER_BYTE * WIDTH);
    if (left < count) {
      std::memcpy(padded, values, left * sizeof(float));
      std::memset(padded + left, 0, (count - left) * sizeof(float));
      values = padded;
    }
    const float largest = largest_size(values, count);
    if (!(largest <= 3e38f) || (largest > 0 && largest < 1e-25f)) return false;
    if (!is_even(values, count, largest, to.powers)) return false;
    const float inverse = largest > 0 ? LARGEST / largest : 0;
    for (int d = 0; d < DIGITS; ++d) scales[d] = largest / LARGEST * static_cast<float>(1 << 8 * d);
    for (int64_t k = 0; k < count; ++k) {
      const float rounded = __builtin_nearbyintf(values[k] * inverse);
      q[k] = static_cast<int32_t>(rounded < -LARGEST ? -LARGEST : rounded > LARGEST ? LARGEST : rounded);
    }
    for (int64_t k = 0; k < count; ++k) {
      int32_t rest = q[k];
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; ++d) {
        const int32_t above = (rest + 128) >> 8;  // rounded, so that digits are signed
        digits[d][k] = static_cast<int8_t>(rest - above * 256);
        rest = above;
      }
    }
    put_group<Lane, WIDTH, PER_BYTE>(digits, count, piece, out, corrections);
  }
  return out;
}

// Whether all bytes[k] - zero are signed bytes.
inline bool are_digits(const uint8_t* bytes, int64_t count, int zero) {
  uint8_t least = 255, largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    least = bytes[k] < least ? bytes[k] : least;
    largest = bytes[k] > largest ? bytes[k] : largest;
  }
  return least - zero >= -128 && largest - zero <= 127;
}

// Of two digits, value = 2 * high + low: none is -128, so that every sum fits.
template <class Lane, int64_t WIDTH, int64_t PER_BYTE, int DIGITS>
bool split_bytes_of(const uint8_t* bytes, int zero, const Digits& to) {
  int8_t* out = to.digits;
  uint8_t* corrections = to.corrections;
  float* scales = to.scales;
  alignas(64) int8_t digits[DIGITS][GROUP];
  if (DIGITS == 1 && !are_digits(bytes, to.columns, zero)) return false;
  for (int64_t first = 0; first < to.columns && out; first += GROUP, scales += DIGITS) {
    const int64_t left = to.columns - first, count = group_columns(left, PER_BYTE * WIDTH);
    for (int64_t k = 0; k < count; ++k) {
      const int value = k < left ? bytes[first + k] - zero : 0;
      if constexpr (DIGITS == 1) {
        digits[0][k] = static_cast<int8_t>(value);
      } else {
        digits[0][k] = static_cast<int8_t>(value & 1);
        digits[1][k] = static_cast<int8_t>(value >> 1);
      }
    }
    scales[0] = 1;
    if constexpr (DIGITS == 2) scales[1] = 2;
    put_group<Lane, WIDTH, PER_BYTE>(digits, count, GROUP, out, corrections);
  }
  return out;
}

template <class Lane, int64_t WIDTH, int DIGITS>
bool split_floats(const float* x, int bits, const Digits& to) {
  const auto split = bits == 1   ? split_floats_of<Lane, WIDTH, 8, DIGITS>
                     : bits == 2 ? split_floats_of<Lane, WIDTH, 4, DIGITS>
                                 : split_floats_of<Lane, WIDTH, 2, DIGITS>;
  return split(x, to);
}

template <class Lane, int64_t WIDTH>
bool split_digits(const float* x, int bits, const Digits& to) {
  const auto split = to.count == 2   ? split_floats<Lane, WIDTH, 2>
                     : to.count == 3 ? split_floats<Lane, WIDTH, 3>
                                     : split_floats<Lane, WIDTH, 4>;
  return split(x, bits, to);
}

template <class Lane, int64_t WIDTH, int DIGITS>
bool split_bytes_to(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  const auto split = bits == 1   ? split_bytes_of<Lane, WIDTH, 8, DIGITS>
                     : bits == 2 ? split_bytes_of<Lane, WIDTH, 4, DIGITS>
                                 : split_bytes_of<Lane, WIDTH, 2, DIGITS>;
  return split(bytes, zero, to);
}

template <class Lane, int64_t WIDTH>
bool split_bytes(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  const auto split = to.count == 1 ? split_bytes_to<Lane, WIDTH, 1> : split_bytes_to<Lane, WIDTH, 2>;
  return split(bytes, zero, bits, to);
}

}  // namespace
}  // namespace bitorch_engine
