#include "quantize/quantize.h"

#include "agreement.h"
#include "runtime/convert.h"

namespace bitorch_engine {

void check_quantize(Agreement& agreement) {
  agreement.check(quantize_activation_kernel, 200, [](QuantizeActivationFunction quantize, Random& random) {
    const Dtype dtype = static_cast<Dtype>(random.between(0, 2));
    const int64_t pixels = random.between(1, 40), channels = random.between(1, 90), order = random.between(0, 2);
    const int64_t pixel_stride = order == 0 ? channels : order == 1 ? 1 : 2;
    const int64_t channel_stride = order == 0 ? 1 : order == 1 ? pixels : 2 * pixels;
    const int bits = static_cast<int>(random.between(1, 8));
    const float low = bits == 1 ? -1.0f : random.flip() ? 0.0f : static_cast<float>(-(1 << (bits - 1)));
    const ActivationRule rule{random.flip() ? 1.0f : 0.7f, low, bits, bits == 1 && random.flip() ? 2 : 1};
    std::vector<float> numbers = random.numbers(2 * pixels * channels, static_cast<float>(1 << bits));
    random.spoil(numbers);
    std::vector<uint16_t> halves;
    for (float x : numbers) halves.push_back(dtype == FLOAT16 ? to_float16(x) : to_bfloat16(x));
    const int64_t out_stride = channels + random.between(0, 3);
    std::vector<uint8_t> out(pixels * out_stride), beyond(pixels * out_stride);
    const bool odd = quantize(dtype == FLOAT32 ? static_cast<const void*>(numbers.data()) : halves.data(), dtype,
                              pixel_stride, channel_stride, pixels, channels, rule, out.data(), out_stride,
                              random.flip() ? beyond.data() : nullptr);
    return Written().add(out).add(beyond).add(odd);
  });
  agreement.check(floats_kernel, 200, [](FloatsFunction floats, Random& random) {
    const int bits = static_cast<int>(random.between(1, 8));
    const std::vector<uint8_t> index = random.bytes(random.between(0, 200), (1 << bits) - 1);
    std::vector<float> out(index.size());
    const float lowest = static_cast<float>(-random.between(0, 128)), factor = random.numbers(1, 1)[0];
    floats(index.data(), static_cast<int64_t>(index.size()), bits, lowest, factor, out.data());
    return Written().add(out);
  });
}

}  // namespace bitorch_engine
