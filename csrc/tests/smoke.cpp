// Every kernel entry that needs no more than bytes, on every instruction set of this processor, through the C
// interface: for processors where Python and torch are not at hand, under qemu. `make check-arm` and docs/kernels.md
// use it.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" {
int be_best_isa();
int be_cap_isa(int isa);
int be_kernel_count();
const char* be_kernel_name(int index);
int be_kernel_has(int index, int isa);
void be_pack(const uint8_t* values, uint8_t* packed, int64_t count, int bits, int threads);
void be_unpack(const uint8_t* packed, uint8_t* values, int64_t count, int bits, int threads);
}

namespace {

// Value i is the bits i * bits .. of the stream, the lowest first.
bool packs(int64_t count, int bits, int threads) {
  std::vector<uint8_t> values(count), packed((count * bits + 7) / 8, 0xff), expected(packed.size(), 0),
      back(count, 0xff);
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = static_cast<uint8_t>(state >> 24 & ((1 << bits) - 1));
    for (int k = 0; k < bits; ++k) {
      const int64_t bit = i * bits + k;
      expected[bit / 8] = static_cast<uint8_t>(expected[bit / 8] | (values[i] >> k & 1) << bit % 8);
    }
  }
  be_pack(values.data(), packed.data(), count, bits, threads);
  be_unpack(expected.data(), back.data(), count, bits, threads);
  return packed == expected && back == values;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  for (int isa = 0; isa <= be_best_isa(); ++isa) {
    if (be_cap_isa(isa) != 0) continue;
    std::printf("instruction set %d:", isa);
    for (int kernel = 0; kernel < be_kernel_count(); ++kernel)
      if (be_kernel_has(kernel, isa)) std::printf(" %s", be_kernel_name(kernel));
    std::printf("\n");
    for (int bits = 1; bits <= 8; ++bits)
      for (int64_t count : {0, 1, 7, 8, 9, 63, 64, 65, 1000, 200003})
        for (int threads : {1, 2}) ++(packs(count, bits, threads) ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
