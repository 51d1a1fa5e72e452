#include "qconv/qconv.h"

#include "agreement.h"
#include "qconv/results.h"

namespace bitorch_engine {
namespace {

Written multiply(MultiplyFunction kernel, Random& random) {
  const int64_t count = random.between(1, ROWS), taps = random.between(1, 4), depth = DEPTH * random.between(1, 3);
  const int64_t blocks = random.between(1, COLUMNS / BLOCK), block_bytes = taps * depth * BLOCK;
  std::vector<Read> reads;  // of some of the taps
  for (int64_t t = 0; t < taps; ++t)
    if (random.between(0, 3) > 0) reads.push_back({random.between(0, 2000), t * depth * BLOCK});
  const int64_t largest = (1 << random.between(1, 8)) - 1, largest_weight = 1 << random.between(0, 7);
  const std::vector<uint8_t> image = random.bytes(8000, largest);
  std::vector<const uint8_t*> rows;
  std::vector<uint8_t> runs;
  while (static_cast<int64_t>(rows.size()) < count) {
    const int64_t run = random.between(1, std::min<int64_t>(16, count - static_cast<int64_t>(rows.size())));
    const int64_t start = random.between(0, 2000), distance = random.between(1, 150);
    for (int64_t i = 0; i < run; ++i) rows.push_back(image.data() + start + i * distance);
    runs.push_back(static_cast<uint8_t>(run));
  }
  std::vector<int8_t> weights(blocks * block_bytes);
  for (int8_t& weight : weights) weight = static_cast<int8_t>(random.between(-largest_weight, largest_weight - 1));
  std::vector<int32_t> totals(ROWS * COLUMNS);
  Setup setup;
  Tile tile{rows.data(), count, reads.data(), static_cast<int64_t>(reads.size()), depth, weights.data(), block_bytes,
            blocks, totals.data(), runs.data(), static_cast<int64_t>(runs.size()),
            pairs_that_fit(largest, largest_weight), nullptr, &setup};
  if (random.flip()) {
    kernel(tile);
    return Written().add(totals);
  }
  const int64_t first = random.between(0, 9), all = first + blocks * BLOCK;
  const std::vector<int32_t> zero_sum(all, 7);
  const std::vector<float> factor = random.numbers(all, 1), sample_factor = random.numbers(count, 1);
  std::vector<float> results(count * all);
  std::vector<Stretch> stretches;
  const int64_t pixel = all * static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < count; i += stretches.back().count)
    stretches.push_back({random.between(1, count - i), reinterpret_cast<uint8_t*>(results.data() + i * all), pixel,
                         sample_factor.data() + i});
  const Results taken{finish_scalar, {zero_sum.data(), factor.data(), nullptr, 0, FLOAT32, false, 0}, stretches.data(),
                      first, blocks * BLOCK - random.between(0, BLOCK - 1), 1};
  tile.results = &taken;
  kernel(tile);
  return Written().add(results);
}

Written finish(FinishFunction kernel, Random& random) {
  const int64_t count = random.between(1, ROWS), first = random.between(0, 99), channels = random.between(1, COLUMNS);
  std::vector<int32_t> totals(ROWS * COLUMNS), zero_sum(first + COLUMNS);
  for (int32_t& total : totals) total = static_cast<int32_t>(random.between(-100000, 100000));
  for (int32_t& sum : zero_sum) sum = static_cast<int32_t>(random.between(-1000, 1000));
  const std::vector<float> factor = random.numbers(first + COLUMNS, 0.01f), bias = random.numbers(first + COLUMNS, 9);
  const std::vector<float> sample_factor = random.numbers(1, 1);
  Epilogue e{zero_sum.data(), factor.data(), random.flip() ? bias.data() : nullptr, 0.0f,
             static_cast<Dtype>(random.between(0, 2)), random.flip(), static_cast<int>(random.between(0, 255))};
  if (random.between(0, 9) == 0) e.poison = std::numeric_limits<float>::quiet_NaN();
  // Channels last, or planes in which pixels follow each other or not.
  const bool last = random.flip();
  const int64_t element = e.bytes ? 1 : e.dtype == FLOAT32 ? 4 : 2, plane = 2 * ROWS, all = first + channels;
  std::vector<uint8_t> memory((last ? count * all : all * plane) * element);
  const int64_t step = last ? all : random.between(1, 2);
  const Stretch rows{count, memory.data(), step * element, random.flip() ? sample_factor.data() : nullptr};
  kernel(totals.data(), rows, first, channels, e, last ? 1 : plane);
  return Written().add(memory);
}

}  // namespace

void check_qconv(Agreement& agreement) {
  agreement.check(multiply_kernel, 200, multiply);
  agreement.check(decode_kernel, 50, [](DecodeFunction decode, Random& random) {
    const int bits = static_cast<int>(random.between(1, 7));
    const int64_t count = 1024 * random.between(1, 3);
    const std::vector<uint8_t> packed = random.bytes(count / 8 * bits);
    std::vector<int8_t> codes(count);
    decode(packed.data(), count, bits, codes.data());
    return Written().add(codes);
  });
  agreement.check(finish_kernel, 300, finish);
  agreement.check(split_kernel, 100, [](SplitFunction split, Random& random) {
    const int64_t count = random.between(1, 5), channels = random.between(1, 150), taps = random.between(1, 35);
    const std::vector<uint8_t> rows = random.bytes(count * channels * taps);
    std::vector<uint8_t> out(rows.size());
    split(rows.data(), count, channels, taps, out.data());
    return Written().add(out);
  });
}

}  // namespace bitorch_engine
