#include "lookup/lookup.h"

namespace bitorch_engine {
namespace lookup {
namespace {

struct Values {
  alignas(64) uint8_t of[256][16];
};

constexpr int differing(int x, int w) {
  int count = 0;
  for (int bits = x ^ w; bits; bits &= bits - 1) ++count;
  return count;
}

constexpr Values sign_values() {
  Values values{};
  for (int x = 0; x < 256; ++x)
    for (int w = 0; w < 16; ++w)
      values.of[x][w] = static_cast<uint8_t>(differing(x & 15, w) + 16 * differing(x >> 4, w));
  return values;
}

// low: the least code of the activation. By four codes of a pixel and a bit of four weights.
constexpr Values pair_values(int low) {
  Values values{};
  for (int x = 0; x < 256; ++x)
    for (int w = 0; w < 16; ++w) {
      int sum = -4 * low;  // counted from the least
      for (int c = 0; c < 4; ++c) sum += (w >> c & 1) * ((x >> 2 * c & 3) + low);
      values.of[x][w] = static_cast<uint8_t>(sum);
    }
  return values;
}

constexpr Values both_signs = sign_values(), from_zero = pair_values(0), from_minus_two = pair_values(-2);

}  // namespace

constexpr Table signs{both_signs.of[0], 0, 256 / 4, 65535 / 2 / 4};
constexpr Table unsigned_pairs{from_zero.of[0], 0, 255 / 12, PAIRS_MOST};
constexpr Table signed_pairs{from_minus_two.of[0], -8, 255 / 12, PAIRS_MOST};

const Kernel<EntriesFunction> sign_entries_kernel{
    "lookup.sign_entries", {sign_entries_scalar, nullptr, BE_X86(sign_entries_avx2)}};
const Kernel<EntriesFunction> pair_entries_kernel{
    "lookup.pair_entries", {pair_entries_scalar, nullptr, BE_X86(pair_entries_avx2)}};
const Kernel<PanelFunction> panel_kernel{"lookup.panel", {panel_scalar, nullptr, BE_X86(panel_avx2)}};
const Kernel<LookUpFunction> signs_kernel{"lookup.signs", {signs_scalar, nullptr, BE_X86(signs_avx2)}};
const Kernel<LookUpFunction> pairs_kernel{"lookup.pairs", {pairs_scalar, nullptr, BE_X86(pairs_avx2)}};
const Kernel<TurnFunction> turn_kernel{"lookup.turn", {turn_scalar, nullptr, BE_X86(turn_avx2)}};

const Lookup of_signs{4, 2 * binary::MOST_BLOCKS, 2, true, sign_entries_kernel, signs_kernel};
const Lookup of_pairs{6, binary::MOST_BLOCKS, 1, false, pair_entries_kernel, pairs_kernel};

}  // namespace lookup
}  // namespace bitorch_engine
