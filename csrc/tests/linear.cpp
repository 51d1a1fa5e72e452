#include "linear/linear.h"

#include <cmath>

#include "agreement.h"

namespace bitorch_engine {
namespace {

// Sums of floats come in another order on every instruction set.
struct Near {
  double value, error;
  bool operator==(const Near& other) const { return std::fabs(value - other.value) <= error + other.error; }
};

}  // namespace

void check_linear(Agreement& agreement) {
  agreement.check(dot_kernel, 200, [](DotFunction dot, Random& random) {
    const int bits = static_cast<int>(random.between(1, 8));
    const int64_t count = 8 * random.between(0, 200);
    const std::vector<uint8_t> packed = random.bytes(count / 8 * bits);
    const std::vector<float> x = random.numbers(count, 1);
    double sizes = 0;
    for (float one : x) sizes += std::fabs(one) * (1 << (bits - 1));
    return Near{dot(packed.data(), x.data(), count, bits), sizes * 0x1p-21};
  });
}

}  // namespace bitorch_engine
