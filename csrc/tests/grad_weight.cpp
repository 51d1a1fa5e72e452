#include "grad_weight/grad_weight.h"

#include "agreement.h"

namespace bitorch_engine {

void check_grad_weight(Agreement& agreement) {
  agreement.check(interleave_kernel, 100, [](InterleaveFunction interleave, Random& random) {
    const int64_t quads = random.between(1, 20), channels = random.between(1, LANES), block_bytes = 64 * quads;
    const std::vector<uint8_t> image = random.bytes(2000);
    std::vector<int64_t> bases(4 * quads);
    for (int64_t& base : bases) base = random.between(0, 2000 - channels);
    std::vector<int8_t> out((channels + 15) / 16 * block_bytes);
    std::vector<int32_t> sums(LANES, 7);
    const int center = static_cast<int>(random.between(1, 128));
    interleave(image.data(), bases.data(), quads, channels, center, out.data(), block_bytes, sums.data());
    return Written().add(out).add(sums);
  });
  agreement.check(widen_kernel, 50, [](WidenFunction widen, Random& random) {
    const int64_t count = random.between(0, 200);
    const std::vector<uint8_t> values = random.bytes(count);
    std::vector<float> out(count);
    widen(values.data(), count, static_cast<int>(random.between(0, 128)), out.data());
    return Written().add(out);
  });
}

}  // namespace bitorch_engine
