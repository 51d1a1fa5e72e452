#include "gradient/gradient.h"

#include "agreement.h"

namespace bitorch_engine {
namespace {

Written round_codes(RoundFunction round, Random& random) {
  const int64_t count = random.between(1, 700);
  std::vector<float> x = random.numbers(count, 2), factor = random.numbers(count, 1), inverse(count);
  random.spoil(x);
  for (float& one : inverse) one = static_cast<float>(random.between(1, 90));
  const Rounding rounding{random.flip() ? factor.data() : nullptr, random.between(0, 1), inverse.data(),
                          random.between(0, 1), static_cast<float>(random.between(1, 127)), random.bits()};
  const uint64_t edge = (uint64_t{1} << 32) - static_cast<uint64_t>(random.between(0, 900));
  const uint64_t first = random.flip() ? random.bits() : edge;
  std::vector<int8_t> codes(count);
  round(x.data(), count, rounding, first, static_cast<uint64_t>(random.between(1, 50)), codes.data());
  return Written().add(codes);
}

Written straight_through(StraightThroughFunction kernel, Random& random) {
  const int64_t count = random.between(1, 700);
  const int bits = static_cast<int>(random.between(1, 8));
  const std::vector<float> grad = random.numbers(count, 2);
  const std::vector<uint8_t> index = random.bytes(count, (1 << bits) - 1), beyond = random.bytes(count, 1);
  const float low = bits == 1 ? -1.0f : random.flip() ? 0.0f : static_cast<float>(-(1 << (bits - 1)));
  std::vector<float> out(count);
  const double sum = kernel(grad.data(), index.data(), beyond.data(), count, low, bits, out.data());
  return Written().add(out).add(sum);
}

}  // namespace

void check_gradient(Agreement& agreement) {
  agreement.check(largest_by_column_kernel, 100, [](LargestByColumnFunction kernel, Random& random) {
    const int64_t rows = random.between(0, 20), columns = random.between(1, 70);
    std::vector<float> x = random.numbers(rows * columns, 3), largest(columns, 0.5f);
    random.spoil(x);
    kernel(x.data(), rows, columns, largest.data());
    return Written().add(largest);
  });
  agreement.check(largest_kernel, 100, [](LargestFunction kernel, Random& random) {
    std::vector<float> x = random.numbers(random.between(0, 300), 3);
    random.spoil(x);
    return Written().add(kernel(x.data(), static_cast<int64_t>(x.size())));
  });
  agreement.check(round_kernel, 100, round_codes);
  agreement.check(straight_through_kernel, 100, straight_through);
}

}  // namespace bitorch_engine
