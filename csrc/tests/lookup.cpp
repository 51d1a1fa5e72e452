#include "lookup/lookup.h"

#include <algorithm>

#include "agreement.h"
#include "qconv/product.h"
#include "runtime/buffer.h"

namespace bitorch_engine {
namespace {

using namespace lookup;
using binary::LANES;

int64_t words_of(int64_t bits) { return (bits + binary::WORD - 1) / binary::WORD; }

std::vector<uint32_t> random_words(Random& random, int64_t count) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = random.bits();
  return words;
}

Written entries(EntriesFunction kernel, Random& random, int64_t per_byte) {
  const int64_t runs = random.between(1, 9), bits = random.between(1, 300);
  const std::vector<uint32_t> words = random_words(random, runs * words_of(bits));
  const std::vector<uint32_t> seconds = random_words(random, runs * words_of(bits));
  std::vector<uint16_t> out(runs * per_byte * bytes_of(bits));
  kernel(words.data(), seconds.data(), runs, bits, out.data());
  return Written().add(out);
}

Written panel(PanelFunction kernel, Random& random) {
  const int64_t blocks = random.between(1, 8), taps = random.between(1, 5), bits = random.between(1, 100);
  const int64_t block_words = taps * words_of(bits) * LANES, bytes = panel_bytes(taps * bytes_of(bits), blocks);
  const std::vector<uint32_t> weights = random_words(random, blocks * block_words);
  const Buffer<uint8_t> out = new_buffer<uint8_t>(bytes);
  kernel(weights.data(), block_words, blocks, taps, bits, out.get());
  return Written().add(std::vector<uint8_t>(out.get(), out.get() + bytes));
}

// Tiles of some segments; every other has segments as long as sums of bytes allow, and the largest and least sums.
Written multiply(LookUpFunction kernel, Random& random, const Lookup& lookup, const Table& table) {
  const bool largest = random.flip();
  binary::Tile t{};
  t.count = random.between(1, lookup.pixels);
  t.blocks = random.flip() ? lookup.blocks : random.between(1, binary::MOST_BLOCKS);
  std::vector<binary::Segment> segments(random.between(0, 4));
  int64_t length = 0, all = 0;
  for (binary::Segment& s : segments) {
    s = {random.between(0, 20), all, largest ? table.longest : random.between(1, table.longest)};
    all += s.words;
    length = std::max(length, s.image + s.words);
  }
  t.image_step = random.between(1, 9);
  std::vector<uint16_t> image(length + lookup.pixels * t.image_step);
  for (uint16_t& entry : image) entry = static_cast<uint16_t>((largest ? 255 : random.between(0, 255)) * 16);
  const int64_t bytes = panel_bytes(all, t.blocks);
  const Buffer<uint8_t> panel = new_buffer<uint8_t>(bytes + 1);
  for (int64_t i = 0; i < bytes; ++i) panel[i] = static_cast<uint8_t>(largest ? i % 2 * 15 : random.between(0, 15));
  t.segments = segments.data();
  t.segment_count = static_cast<int64_t>(segments.size());
  t.products = static_cast<int32_t>(random.between(0, 4000));
  const std::vector<float> factor = random.numbers(t.blocks * LANES, 1), added = random.numbers(t.blocks * LANES, 9);
  std::vector<int32_t> totals(lookup.pixels * COLUMNS);
  t.out_step = lookup.blocks * LANES + random.between(0, 5);
  std::vector<float> out(lookup.pixels * t.out_step);
  if (t.blocks <= binary::MOST_BLOCKS && random.flip()) {
    t.totals = totals.data();
  } else {
    t.out = out.data();
    t.factor = factor.data();
    t.added = random.flip() ? added.data() : nullptr;
  }
  kernel(t, table, image.data(), panel.get());
  return Written().add(totals).add(out);
}

Written turn(TurnFunction kernel, Random& random) {
  const int64_t pixels = random.between(1, 70), channels = 4 * random.between(1, COLUMNS / 4);
  const int64_t step = random.flip() ? 1 : random.between(1, 3), plane = pixels * step + random.between(0, 3);
  const std::vector<float> rows = random.numbers(pixels * COLUMNS, 1);
  std::vector<float> out(channels * plane);
  kernel(rows.data(), pixels, channels, out.data(), step, plane);
  return Written().add(out);
}

}  // namespace

void check_lookup(Agreement& agreement) {
  agreement.check(sign_entries_kernel, 100, [](auto kernel, Random& random) { return entries(kernel, random, 2); });
  agreement.check(pair_entries_kernel, 100, [](auto kernel, Random& random) { return entries(kernel, random, 1); });
  agreement.check(panel_kernel, 100, panel);
  agreement.check(signs_kernel, 200, [](auto kernel, Random& random) {
    return multiply(kernel, random, of_signs, signs);
  });
  agreement.check(pairs_kernel, 200, [](auto kernel, Random& random) {
    return multiply(kernel, random, of_pairs, random.flip() ? signed_pairs : unsigned_pairs);
  });
  agreement.check(turn_kernel, 100, turn);
}

}  // namespace bitorch_engine
