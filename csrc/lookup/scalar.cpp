#include "lookup/lookup.h"
#include "qconv/product.h"

namespace bitorch_engine {
namespace lookup {
namespace {

using binary::LANES;
using binary::WORD;

int64_t words_of(int64_t bits) { return (bits + WORD - 1) / WORD; }

// Where a vector has the byte of result channel 0 .. 31.
int64_t place_of(int64_t channel) {
  const int64_t odd = channel / 16, c = channel % 16;
  return c / 4 % 2 * 16 + (c / 8 * 4 + c % 4) * 2 + odd;
}

uint16_t table_of(int bits) { return static_cast<uint16_t>(bits * 16); }

// sum(pixel, channel, entry, line of the panel): what one of them adds.
template <class Sum>
void multiply(const binary::Tile& t, const uint16_t* image, const uint8_t* panel, int64_t line, const Sum& sum) {
  for (int64_t m = 0; m < t.count; ++m)
    for (int64_t o = 0; o < t.blocks * LANES; ++o) {
      int32_t total = t.products;
      for (const binary::Segment *s = t.segments, *end = s + t.segment_count; s < end; ++s)
        for (int64_t k = 0; k < s->words; ++k)
          total += sum(m, image + s->image + k, panel + (s->weights + k) * line + o / 32 * 32 + place_of(o % 32));
      if (t.totals) {
        t.totals[m * COLUMNS + o] = total;
      } else {
        const float value = static_cast<float>(total) * t.factor[o];
        t.out[m * t.out_step + o] = t.added ? value + t.added[o] : value;
      }
    }
}

}  // namespace

void sign_entries_scalar(const uint32_t* words, const uint32_t* seconds, int64_t runs, int64_t bits, uint16_t* out) {
  for (int64_t run = 0; run < runs; ++run, words += words_of(bits), seconds += words_of(bits))
    for (int64_t i = 0; i < 2 * bytes_of(bits); ++i)
      *out++ = table_of((words[i / 8] >> i % 8 * 4 & 15) | (seconds[i / 8] >> i % 8 * 4 & 15) << 4);
}

void pair_entries_scalar(const uint32_t* words, const uint32_t*, int64_t runs, int64_t bits, uint16_t* out) {
  for (int64_t run = 0; run < runs; ++run, words += words_of(bits))
    for (int64_t i = 0; i < bytes_of(bits); ++i) *out++ = table_of(words[i / 4] >> i % 4 * 8 & 255);
}

void panel_scalar(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t bits,
                  uint8_t* out) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t i = 0; i < 2 * bytes_of(bits); ++i)
      for (int64_t o = 0; o < (blocks + 1) / 2 * 32; ++o) {
        const uint32_t* block = weights + o / LANES * block_words + (t * words_of(bits) + i / 8) * LANES;
        const uint32_t four = o / LANES < blocks ? block[o % LANES] >> i % 8 * 4 & 15 : 0;
        out[(t * 2 * bytes_of(bits) + i) * ((blocks + 1) / 2 * 32) + o / 32 * 32 + place_of(o % 32)] =
            static_cast<uint8_t>(four);
      }
}

void signs_scalar(const binary::Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel) {
  multiply(t, image, panel, (t.blocks + 1) / 2 * 32, [&](int64_t m, const uint16_t* entry, const uint8_t* four) {
    const int both = table.values[entry[m / 2 * 2 * t.image_step] + *four];
    return -2 * (m % 2 ? both >> 4 : both & 15);
  });
}

void pairs_scalar(const binary::Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel) {
  const int64_t line = (t.blocks + 1) / 2 * 32;
  multiply(t, image, panel, 2 * line, [&](int64_t m, const uint16_t* entry, const uint8_t* four) {
    const uint8_t* values = table.values + entry[m * t.image_step];
    return values[four[0]] - 2 * values[four[line]];
  });
}

void turn_scalar(const float* rows, int64_t pixels, int64_t channels, float* out, int64_t step, int64_t plane) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t o = 0; o < channels; ++o) out[o * plane + p * step] = rows[p * COLUMNS + o];
}

}  // namespace lookup
}  // namespace bitorch_engine
