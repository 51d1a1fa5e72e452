#include "lookup/lookup.h"

namespace bitorch_engine {
namespace lookup {
namespace {

struct SignValues {
  alignas(64) uint8_t of[256][16];
};

constexpr int differing(int x, int w) {
  int count = 0;
  for (int bits = x ^ w; bits; bits &= bits - 1) ++count;
  return count;
}

constexpr SignValues sign_values() {
  SignValues values{};
  for (int x = 0; x < 256; ++x)
    for (int w = 0; w < 16; ++w)
      values.of[x][w] = static_cast<uint8_t>(differing(x & 15, w) + 16 * differing(x >> 4, w));
  return values;
}

// By the four codes of a pixel; for the lower and the upper two of them.
struct PairValues {
  int32_t least, most;
  alignas(64) uint8_t of[256][2][16];
};

// low: the least code of the activation.
constexpr PairValues pair_values(int low) {
  PairValues values{2 * -2 * (low + 3), 0, {}};
  for (int x = 0; x < 256; ++x)
    for (int half = 0; half < 2; ++half)
      for (int w = 0; w < 16; ++w) {
        const int codes = x >> (4 * half) & 15;
        const int products = ((codes & 3) + low) * ((w & 3) - 2) + ((codes >> 2) + low) * ((w >> 2) - 2);
        const int value = products - values.least;
        values.of[x][half][w] = static_cast<uint8_t>(value);
        if (value > values.most) values.most = value;
      }
  return values;
}

constexpr SignValues both_signs = sign_values();
constexpr PairValues from_zero = pair_values(0), from_minus_two = pair_values(-2);

// most: of an entry.
constexpr Table table_of(const uint8_t* values, int32_t times, int32_t least, int64_t most) {
  return {values, times, least, 255 / most, 65535 / most};
}

}  // namespace

constexpr Table signs = table_of(both_signs.of[0], -2, 0, 4);
constexpr Table unsigned_pairs = table_of(from_zero.of[0][0], 1, from_zero.least, 2 * from_zero.most);
constexpr Table signed_pairs = table_of(from_minus_two.of[0][0], 1, from_minus_two.least, 2 * from_minus_two.most);

}  // namespace lookup
}  // namespace bitorch_engine
