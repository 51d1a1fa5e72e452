#include "binary/binary.h"

#include "agreement.h"
#include "qconv/product.h"
#include "runtime/convert.h"

namespace bitorch_engine {
namespace {

using namespace binary;

Written multiply(binary::MultiplyFunction kernel, Random& random) {
  binary::Tile t{};
  t.count = random.between(1, MOST_PIXELS);
  t.blocks = random.between(1, MOST_BLOCKS);
  t.image_step = random.between(1, 9);
  std::vector<Segment> segments(random.between(0, 4));
  int64_t image_words = 0, weight_words = 0;
  for (Segment& s : segments) {
    s = {random.between(0, 20), weight_words, random.between(1, 7)};
    weight_words += s.words;
    image_words = std::max(image_words, s.image + s.words);
  }
  std::vector<uint32_t> image(image_words + MOST_PIXELS * t.image_step);
  std::vector<uint32_t> weights(t.blocks * weight_words * binary::LANES);
  for (uint32_t& word : image) word = random.bits();
  for (uint32_t& word : weights) word = random.bits();
  const std::vector<float> factor = random.numbers(MOST_BLOCKS * binary::LANES, 1);
  const std::vector<float> added = random.numbers(MOST_BLOCKS * binary::LANES, 9);
  std::vector<int32_t> totals(MOST_PIXELS * COLUMNS);
  t.out_step = MOST_BLOCKS * binary::LANES + random.between(0, 5);
  std::vector<float> out(MOST_PIXELS * t.out_step);
  t.image = image.data();
  t.segments = segments.data();
  t.segment_count = static_cast<int64_t>(segments.size());
  t.weights = weights.data();
  t.block_words = weight_words * binary::LANES;
  t.products = static_cast<int32_t>(32 * weight_words - random.between(0, 31));
  if (random.flip()) {
    t.totals = totals.data();
  } else {
    t.out = out.data();
    t.factor = factor.data();
    t.added = random.flip() ? added.data() : nullptr;
  }
  kernel(t);
  return Written().add(totals).add(out);
}

Written sign(SignFunction kernel, Random& random) {
  Floats f{};
  f.dtype = static_cast<Dtype>(random.between(0, 2));
  f.pixels = random.between(1, 70);
  f.channels = random.between(1, 100);
  f.pixel_stride = random.flip() ? 1 : f.channels;
  f.channel_stride = f.pixel_stride == 1 ? f.pixels : 1;
  f.inverse_scale = random.flip() ? 3.0f : 0.25f;
  std::vector<float> numbers = random.numbers(f.pixels * f.channels, 2);
  random.spoil(numbers);
  std::vector<uint16_t> halves;
  for (float x : numbers) halves.push_back(f.dtype == FLOAT16 ? to_float16(x) : to_bfloat16(x));
  f.x = f.dtype == FLOAT32 ? static_cast<const void*>(numbers.data()) : halves.data();
  const int64_t stride = (f.channels + WORD - 1) / WORD + random.between(0, 2);
  std::vector<uint32_t> out(f.pixels * stride);
  const bool odd = kernel(f, out.data(), stride);
  return Written().add(out).add(odd);
}

Written arrange(ArrangeFunction kernel, Random& random) {
  const int64_t channels = random.between(1, 100), taps = random.between(1, 30);
  const int first = static_cast<int>(random.between(0, 7));
  const std::vector<uint8_t> row = random.bytes((first + channels * taps + 7) / 8 + 64);
  std::vector<uint32_t> out(taps * ((channels + WORD - 1) / WORD) * binary::LANES);
  kernel(row.data(), first, channels, taps, out.data());
  return Written().add(out);
}

}  // namespace

void check_binary(Agreement& agreement) {
  agreement.check(binary::multiply_kernel, 200, multiply);
  agreement.check(sign_kernel, 100, sign);
  agreement.check(arrange_kernel, 100, arrange);
}

}  // namespace bitorch_engine
