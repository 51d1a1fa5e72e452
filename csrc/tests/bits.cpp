#include "bits/bits.h"

#include "agreement.h"

namespace bitorch_engine {

void check_bits(Agreement& agreement) {
  agreement.check(pack_kernel, 100, [](PackFunction pack, Random& random) {
    const int bits = static_cast<int>(random.between(1, 8));
    const int64_t count = 8 * random.between(0, 60);
    const std::vector<uint8_t> values = random.bytes(count, (1 << bits) - 1);
    std::vector<uint8_t> packed(count / 8 * bits);
    pack(values.data(), packed.data(), count, bits);
    return Written().add(packed);
  });
  agreement.check(unpack_kernel, 100, [](UnpackFunction unpack, Random& random) {
    const int bits = static_cast<int>(random.between(1, 8));
    const int64_t count = 8 * random.between(0, 60);
    const std::vector<uint8_t> packed = random.bytes(count / 8 * bits);
    std::vector<uint8_t> values(count);
    unpack(packed.data(), values.data(), count, bits);
    return Written().add(values);
  });
}

}  // namespace bitorch_engine
