#include "bits/bits.h"

#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<PackFunction> pack_kernel{"pack", {pack_scalar, nullptr, BE_X86(pack_avx2)}};
const Kernel<UnpackFunction> unpack_kernel{
    "unpack", {unpack_scalar, nullptr, BE_X86(unpack_avx2), BE_X86(unpack_avx512)}};

void unpack_range(const uint8_t* packed, int64_t first, int64_t count, int bits, uint8_t* values) {
  // A group of eight that is not wanted whole is unpacked aside.
  const auto part = [&](int64_t group, int64_t from, int64_t to) {
    uint8_t eight[8], bytes[8] = {};
    std::copy(packed + group * bits, packed + group * bits + (to * bits + 7) / 8, bytes);
    unpack_scalar(bytes, eight, 8, bits);
    values = std::copy(eight + from, eight + to, values);
  };
  const int64_t last = first + count;
  if (first % 8 && count) {
    const int64_t end = std::min(last - first / 8 * 8, int64_t{8});
    part(first / 8, first % 8, end);
    first = first / 8 * 8 + end;
  }
  const int64_t whole = std::max<int64_t>(last - first, 0) & ~int64_t{7};
  unpack_kernel.pick()(packed + first / 8 * bits, values, whole, bits);
  values += whole;
  first += whole;
  if (first < last) part(first / 8, 0, last - first);
}

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
