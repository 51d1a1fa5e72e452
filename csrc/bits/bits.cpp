#include "bits/bits.h"

#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<PackFunction> pack_kernel{"pack", {pack_scalar}};
const Kernel<UnpackFunction> unpack_kernel{"unpack", {unpack_scalar}};

namespace {
constexpr int64_t GRAIN = 1 << 16;  // values a thread takes at least
}

}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT void be_pack(const uint8_t* values, uint8_t* packed, int64_t count, int bits, int threads) {
  const auto kernel = pack_kernel.pick();
  const int64_t whole = count & ~int64_t{7};
  parallel_for(whole, GRAIN, threads, [=](int64_t first, int64_t last) {
    kernel(values + first, packed + first / 8 * bits, last - first, bits);
  });
  if (whole == count) return;
  uint8_t last_values[8] = {}, last_bytes[8];
  std::copy(values + whole, values + count, last_values);
  pack_scalar(last_values, last_bytes, 8, bits);
  std::copy(last_bytes, last_bytes + ((count - whole) * bits + 7) / 8, packed + whole / 8 * bits);
}

BE_EXPORT void be_unpack(const uint8_t* packed, uint8_t* values, int64_t count, int bits, int threads) {
  const auto kernel = unpack_kernel.pick();
  const int64_t whole = count & ~int64_t{7};
  parallel_for(whole, GRAIN, threads, [=](int64_t first, int64_t last) {
    kernel(packed + first / 8 * bits, values + first, last - first, bits);
  });
  if (whole == count) return;
  uint8_t last_values[8], last_bytes[8] = {};
  const uint8_t* tail = packed + whole / 8 * bits;
  std::copy(tail, tail + ((count - whole) * bits + 7) / 8, last_bytes);
  unpack_scalar(last_bytes, last_values, 8, bits);
  std::copy(last_values, last_values + (count - whole), values + whole);
}
