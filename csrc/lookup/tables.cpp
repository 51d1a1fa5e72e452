#include "lookup/lookup.h"

namespace bitorch_engine {
namespace lookup {
namespace {

// Value of the bits x of a pixel and w of a weight, four each, counted from `least`.
template <class Value>
constexpr Table table_of(int32_t times, int32_t least, const Value& value) {
  Table table{{}, times, least, 0, 0};
  int64_t largest = 0;
  for (int x = 0; x < 256; ++x)
    for (int half = 0; half < 2; ++half)
      for (int w = 0; w < 16; ++w) {
        const int found = value(x >> (4 * half) & 15, w) - least;
        table.values[x][half][w] = static_cast<uint8_t>(found);
        if (found > largest) largest = found;
      }
  table.longest = 255 / (2 * largest);
  table.most = 65535 / (2 * largest);
  return table;
}

constexpr int differing(int x, int w) {
  int count = 0;
  for (int bits = x ^ w; bits; bits &= bits - 1) ++count;
  return count;
}

template <int low>
constexpr int products(int x, int w) {
  return ((x & 3) + low) * ((w & 3) - 2) + ((x >> 2) + low) * ((w >> 2) - 2);
}

}  // namespace

constexpr Table signs = table_of(-2, 0, differing);
constexpr Table unsigned_pairs = table_of(1, -12, products<0>);
constexpr Table signed_pairs = table_of(1, -4, products<-2>);

}  // namespace lookup
}  // namespace bitorch_engine
