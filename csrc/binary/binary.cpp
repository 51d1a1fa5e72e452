#include "binary/binary.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "binary/boxes.h"
#include "binary/image.h"
#include "lookup/lookup.h"
#include "qconv/results.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"

namespace bitorch_engine {
namespace binary {

const Kernel<MultiplyFunction> multiply_kernel{
    "binary.multiply", {multiply_scalar, BE_ARM(multiply_neon), BE_X86(multiply_avx2), BE_X86(multiply_avx512)}};
const Kernel<SignFunction> sign_kernel{
    "binary.sign", {sign_scalar, BE_ARM(sign_neon), BE_X86(sign_avx2), BE_X86(sign_avx512)}};
const Kernel<ArrangeFunction> arrange_kernel{
    "binary.arrange", {arrange_scalar, nullptr, BE_X86(arrange_avx2), BE_X86(arrange_avx512)}};

namespace {

constexpr int64_t PIXELS_AT_ONCE = 96;  // they share the weights of a block while those are in the L1 cache
constexpr int64_t LOOKED_UP_AT_ONCE = 208;  // the same for a panel, which has to be made: all of a map of 14 x 14
constexpr int64_t PRODUCTS_A_THREAD = 1 << 24;  // at least: 10 us
static_assert(LANES == BLOCK && MOST_BLOCKS * LANES == COLUMNS, "totals are finished by the engine's kernel");

// What stays the same over a whole call. At 2 bits the channels of the geometry are bits.
struct Call {
  const Geometry& geometry;
  const std::vector<Box>& boxes;
  const uint32_t* image;
  const lookup::Lookup* lookup;  // or null
  const lookup::Table* table;    // of the lookup
  const Entries& entries;        // the image as it reads it
  const uint32_t* weights;
  const float* factor;
  const float* bias;  // or null
  uint8_t* out;
  Dtype dtype;
  int64_t out_channel, out_steps[4];  // strides of the result in elements: of channels, and as those of a Box
  int32_t tap_total;                  // what each tap inside the image adds to the total that is looked up
  const uint8_t* upcoming;            // what is read after this call: fetched into the cache along the way
  int64_t upcoming_bytes;

  int64_t tiles() const { return boxes.back().end(); }
  int64_t channels() const { return geometry.in_channels / geometry.groups; }
  int64_t words() const { return words_of(channels()); }
  int64_t units() const { return lookup ? lookup->entries * lookup::bytes_of(channels()) : words(); }
  int64_t tile_pixels() const { return lookup ? lookup->pixels : MOST_PIXELS; }
  int64_t pitch() const { return geometry.groups * units(); }  // words of one pixel, or entries
  int64_t results() const { return geometry.out_channels / geometry.groups; }
  int64_t blocks() const { return (results() + LANES - 1) / LANES; }
  // Of a tile at most. More than MOST_BLOCKS only for floats in place, where all are whole and the L1 cache has room
  // for them.
  int64_t blocks_at_once() const {
    constexpr int64_t ROOM = 20 << 10;
    if (!lookup || dtype != FLOAT32 || out_channel != 1 || results() % (lookup->blocks * LANES)) return MOST_BLOCKS;
    return panel_bytes(lookup->blocks) <= ROOM ? lookup->blocks : MOST_BLOCKS;
  }
  int64_t panel_bytes(int64_t blocks) const {
    return lookup ? lookup::panel_bytes(geometry.taps() * lookup::bytes_of(channels()), blocks) : 0;
  }
  int64_t block_words() const { return LANES * geometry.taps() * words(); }
  int64_t element() const { return dtype == FLOAT32 ? 4 : 2; }
};

// The pixels of a tile: where they read, in words or entries, and where they write, in elements.
struct Place {
  const Box* box;
  int64_t count, image, image_step, out, out_step;
};

// Goes from tile to tile, without a division: there are as many tiles as there are microseconds of work in a few.
class Walk {
 public:
  Walk(const Call& call, int64_t tile) : call_(call), box_(call.boxes.data()) {
    const Geometry& g = call.geometry;
    const int64_t line = g.in[2] * call.pitch(), plane = g.in[1] * line;
    const int64_t steps[4] = {g.in[0] * plane, plane, line, call.pitch()};
    const int64_t stride[4] = {1, g.stride[0], g.stride[1], g.stride[2]}, pad[4] = {0, g.pad[0], g.pad[1], g.pad[2]};
    origin_ = 0;
    for (int d = 0; d < 4; ++d) {
      origin_ -= pad[d] * steps[d];
      image_steps_[d] = stride[d] * steps[d];
    }
    while (tile >= box_->end()) ++box_;
    tile -= box_->first_tile;
    left_ = box_->tiles() - tile;
    piece_ = tile % box_->pieces;
    tile /= box_->pieces;
    for (int d = 3; d >= 0; --d) {
      at_[d] = d == box_->along ? 0 : tile % box_->span[d].count;
      if (d != box_->along) tile /= box_->span[d].count;
    }
    cut();
  }

  // Of the tile where it stands; then it stands at the next one.
  Place next() {
    if (left_ == 0) {
      ++box_;
      left_ = box_->tiles();
      piece_ = 0;
      std::fill_n(at_, 4, 0);
      cut();
    }
    const int along = box_->along;
    const int64_t shorter = piece_ < longer_ ? 0 : 1;
    Place place{box_, length_ - shorter, origin_, image_steps_[along], 0, call_.out_steps[along]};
    at_[along] = piece_ * length_ - (shorter ? piece_ - longer_ : 0);
    for (int d = 0; d < 4; ++d) {
      const int64_t position = box_->span[d].first + at_[d];
      place.image += position * image_steps_[d];
      place.out += position * call_.out_steps[d];
    }
    --left_;
    if (++piece_ == box_->pieces) {
      piece_ = 0;
      for (int d = 3; d >= 0; --d) {
        if (d == along) continue;
        if (++at_[d] < box_->span[d].count) break;
        at_[d] = 0;
      }
    }
    return place;
  }

 private:
  // The first `longer_` pieces of a line have length_ pixels, the others one less.
  void cut() {
    const int64_t count = box_->span[box_->along].count;
    length_ = (count + box_->pieces - 1) / box_->pieces;
    longer_ = count - box_->pieces * (length_ - 1);
  }

  const Call& call_;
  const Box* box_;
  int64_t origin_, image_steps_[4];  // words or entries
  int64_t left_, piece_, at_[4];     // tiles in this box; piece of the line; the line, from the start of the box
  int64_t length_, longer_;
};

// Writes what a pixel of the box reads; returns the number of segments.
int64_t segments_of(const Call& call, const Box& box, Segment* segments) {
  const Geometry& g = call.geometry;
  const Span &z = box.span[1], &y = box.span[2], &x = box.span[3];
  const int64_t units = call.units(), step = g.dilation[2] * call.pitch();
  const int64_t taps = x.high - x.low, together = step == units ? taps : 1;
  // Entries until sums are widened: about as many each time, a multiple of those that are added at once.
  constexpr int64_t AT_ONCE = 12;
  const int64_t all = (z.high - z.low) * (y.high - y.low) * taps * units, longest = call.table->longest;
  const int64_t times = std::max<int64_t>(1, (all + longest - 1) / longest), each = (all + times - 1) / times;
  const int64_t most = std::min(longest, round_up(each, AT_ONCE));
  int64_t count = 0, room = most;
  for (int64_t a = z.low; a < z.high; ++a)
    for (int64_t b = y.low; b < y.high; ++b)
      for (int64_t c = x.low; c < x.high; c += together) {
        const int64_t line = a * g.dilation[0] * g.in[1] + b * g.dilation[1];
        const int64_t tap = (a * g.kernel[1] + b) * g.kernel[2] + c;
        const int64_t image = line * g.in[2] * call.pitch() + c * step, length = together * units;
        for (int64_t at = 0, piece; at < length; at += piece) {
          piece = call.lookup ? std::min(room, length - at) : length;
          segments[count++] = {image + at, tap * units + at, piece};
          room = room > piece ? room - piece : most;
        }
      }
  return count;
}

constexpr int64_t LINE = 64 / sizeof(float);  // of the cache

// Gets the lines that the next tile writes, while this one is computed. Those of wide tiles come in pairs: to ask for
// all of them takes longer than it saves.
void fetch_results(const Call& call, const Place& place, int64_t channel, int64_t channels) {
  const int64_t step = channels > COLUMNS ? 2 * LINE : LINE;
  for (int64_t m = 0; m < place.count; ++m) {
    const float* out = reinterpret_cast<const float*>(call.out) + place.out + m * place.out_step + channel;
    for (int64_t o = 0; o < channels; o += step) __builtin_prefetch(out + o, 1);
  }
}

// The same for planes, from `channel` on.
__attribute__((always_inline)) inline void fetch_planes(const Call& call, const Place& place, int64_t channel,
                                                        int64_t channels) {
  const float* out = reinterpret_cast<const float*>(call.out) + place.out + channel * call.out_channel;
  for (int64_t o = 0; o < channels; ++o) __builtin_prefetch(out + o * call.out_channel, 1, 2);
}

// Points a tile at what the pixels of a box read.
void read_box(const Call& call, const Box& box, Segment* segments, Tile& tile) {
  int64_t inside = 1;
  for (int d = 1; d < 4; ++d) inside *= box.span[d].high - box.span[d].low;
  tile.segments = segments;
  tile.segment_count = segments_of(call, box, segments);
  tile.products = static_cast<int32_t>(inside * call.tap_total);
}

// What tiles store that have not the order of the result: rows of floats, which are turned to planes, or of totals.
class Rows {
 public:
  Rows(const Call& call, int64_t tiles)
      : call_(call),
        share_(COLUMNS / (LINE / call.tile_pixels())),
        rows_(new_buffer<float>(tiles * call.tile_pixels() * COLUMNS)),
        stretches_(tiles) {}

  // Begins with those of `channels` channels, `first` the first of them. whole: so are their blocks.
  void begin(int64_t first, int64_t channels, bool whole) {
    first_ = first;
    channels_ = channels;
    turned_ = whole && call_.lookup;
    count_ = number_ = fetched_ = 0;
  }

  // The next tile.
  void take(const Place& place, Tile& tile) {
    tile.out = rows_.get() + count_ * COLUMNS;
    tile.out_step = COLUMNS;
    if (turned_) {
      fetch_planes(call_, place, first_ + fetched_, std::min(share_, channels_ - fetched_));
      fetched_ = fetched_ + share_ < channels_ ? fetched_ + share_ : 0;
    } else {
      tile.totals = reinterpret_cast<int32_t*>(tile.out);
    }
    uint8_t* const to = call_.out + (place.out + first_ * call_.out_channel) * call_.element();
    const int64_t step = place.out_step * call_.element();
    Stretch* const last = stretches_.data() + number_ - 1;
    if (number_ > 0 && last->step == step && to == last->out + last->count * step) last->count += place.count;
    else stretches_[number_++] = {place.count, to, step, nullptr};
    count_ += place.count;
  }

  // Where they belong. tile: one of them.
  void store(const Tile& tile) const {
    if (!turned_) {
      const int32_t zero_sum[COLUMNS] = {};
      const Epilogue epilogue{zero_sum, tile.factor, tile.added, 0, call_.dtype, false, 0};
      const Results results{finish_kernel.pick(), epilogue, stretches_.data(), 0, channels_, call_.out_channel};
      results.take(reinterpret_cast<const int32_t*>(rows_.get()), 0, count_, 0, tile.blocks * LANES);
      return;
    }
    const auto turn = lookup::turn_kernel.pick();
    const float* from = rows_.get();
    for (const Stretch *s = stretches_.data(), *end = s + number_; s < end; from += s++->count * COLUMNS)
      turn(from, s->count, channels_, reinterpret_cast<float*>(s->out), s->step / call_.element(), call_.out_channel);
  }

 private:
  const Call& call_;
  const int64_t share_;  // of the channels of planes, whose lines a few tiles fill
  const Buffer<float> rows_;
  std::vector<Stretch> stretches_;  // of the results
  int64_t first_, channels_, count_, number_, fetched_;  // count: of rows.  number: of stretches.  fetched: channels
  bool turned_;
};

// What is read after this call, fetched by a thread's share of tiles, some lines with each.
class Upcoming {
 public:
  Upcoming(const Call& call, int64_t first_tile, int64_t last_tile, int64_t passes)
      : next_(call.upcoming + call.upcoming_bytes * first_tile / call.tiles()),
        end_(call.upcoming + call.upcoming_bytes * last_tile / call.tiles()),
        lines_(1 + call.upcoming_bytes / (64 * call.tiles() * passes)) {}

  void fetch() {
    for (int64_t line = 0; line < lines_ && next_ < end_; ++line, next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const uint8_t *next_, *const end_;
  const int64_t lines_;
};

// One thread's share: tiles first_tile .. last_tile of all boxes, blocks first_block .. last_block of one group.
void multiply_part(const Call& call, int64_t group, int64_t first_tile, int64_t last_tile, int64_t first_block,
                   int64_t last_block) {
  const auto multiply = multiply_kernel.pick();
  const auto make_panel = lookup::panel_kernel.pick();
  const auto look_up = call.lookup ? call.lookup->multiply_kernel.pick() : nullptr;
  const int64_t taps = call.geometry.taps(), results = call.results(), group_start = group * call.units();
  const int64_t tiles_at_once = call.lookup ? LOOKED_UP_AT_ONCE / call.lookup->pixels : PIXELS_AT_ONCE / MOST_PIXELS;
  const int64_t blocks_at_once = call.blocks_at_once();
  const int64_t passes = (last_block - first_block + blocks_at_once - 1) / blocks_at_once;
  const std::unique_ptr<Segment[]> segments(new Segment[taps * (2 + 2 * call.units() / call.table->longest)]);
  const auto panel = new_buffer<uint8_t>(call.panel_bytes(blocks_at_once));
  std::vector<Place> places(tiles_at_once);
  Rows rows(call, tiles_at_once);
  Upcoming upcoming(call, first_tile, group > 0 ? first_tile : last_tile, passes);
  Walk walk(call, first_tile);
  for (int64_t first = first_tile; first < last_tile; first += tiles_at_once) {
    const int64_t count = std::min(tiles_at_once, last_tile - first);
    for (int64_t i = 0; i < count; ++i) places[i] = walk.next();
    const Box* current = nullptr;
    Tile tile{};
    tile.block_words = call.block_words();
    for (int64_t b = first_block; b < last_block; b += blocks_at_once) {
      const int64_t channel = group * results + b * LANES;
      const int64_t channels = std::min(blocks_at_once * LANES, results - b * LANES);
      tile.blocks = std::min(blocks_at_once, last_block - b);
      tile.weights = call.weights + (group * call.blocks() + b) * tile.block_words;
      tile.factor = call.factor + channel;
      tile.added = call.bias ? call.bias + channel : nullptr;
      tile.totals = nullptr;
      if (call.lookup && (passes > 1 || first == first_tile))
        make_panel(tile.weights, tile.block_words, tile.blocks, taps, call.channels(), panel.get());
      const bool whole = call.dtype == FLOAT32 && channels >= tile.blocks * LANES;
      const bool in_place = whole && call.out_channel == 1;
      if (!in_place) rows.begin(channel, channels, whole);
      for (int64_t i = 0; i < count; ++i) {
        const Place& place = places[i];
        if (place.box != current) read_box(call, *(current = place.box), segments.get(), tile);
        tile.image_step = place.image_step;
        tile.count = place.count;
        upcoming.fetch();
        if (in_place) {
          tile.out = reinterpret_cast<float*>(call.out) + place.out + channel;
          tile.out_step = place.out_step;
          if (i + 1 < count) fetch_results(call, places[i + 1], channel, tile.blocks * LANES);
        } else {
          rows.take(place, tile);
        }
        const int64_t image = place.image + group_start;
        if (call.lookup) {
          look_up(tile, *call.table, call.entries.along(place.box->along) + image, panel.get());
        } else {
          tile.image = call.image + image;
          multiply(tile);
        }
      }
      if (!in_place) rows.store(tile);
    }
  }
}

void multiply_all(const Call& call, int threads) {
  const Geometry& g = call.geometry;
  const int64_t tiles = call.tiles();
  const int64_t tile_products = call.tile_pixels() * g.in_channels / g.groups * g.taps();
  for (int64_t group = 0; group < g.groups; ++group) {
    // Threads share the pixels; where those are few, the channels.
    if (tiles >= 4 * threads || call.blocks() < 2 * MOST_BLOCKS) {
      const int64_t grain = 1 + PRODUCTS_A_THREAD / (tile_products * call.results());
      parallel_for(tiles, grain, threads, [&](int64_t first, int64_t last) {
        multiply_part(call, group, first, last, 0, call.blocks());
      });
    } else {
      const int64_t grain = (1 + PRODUCTS_A_THREAD / (tile_products * COLUMNS * tiles)) * MOST_BLOCKS;
      parallel_for(call.blocks(), grain, threads, [&](int64_t first, int64_t last) {
        multiply_part(call, group, 0, tiles, first, last);
      });
    }
  }
}

}  // namespace
}  // namespace binary
}  // namespace bitorch_engine

using namespace bitorch_engine;
using namespace bitorch_engine::binary;

// The arguments of be_binary_conv that are not tensors of a layer; ops/cpu/binary.py has the same fields. Strides are
// in elements and in the order of (N, C, depth, height, width).
struct BinaryArguments {
  Geometry geometry;
  int64_t bits;   // of activations and weights, 1 or 2
  int64_t codes;  // whether x is a packed stream of codes; else floats
  int64_t x_dtype, x_strides[5];
  int64_t out_dtype, out_strides[5];
  int64_t threads;
};

namespace {

// Samples that are converted, then multiplied: enough to fill threads, few enough to stay in the cache, and while one
// lot is multiplied the floats of the next come from memory.
int64_t samples_at_once(const BinaryArguments& a, int64_t sample_bytes) {
  constexpr int64_t LOT = 1 << 19;
  if (a.codes) return a.geometry.batch;
  const int64_t most = 1 + LOT * a.threads / sample_bytes, lots = (a.geometry.batch + most - 1) / most;
  return (a.geometry.batch + lots - 1) / lots;
}

// Where each result reads one pixel, the next line is as good a neighbour as any: all pixels are one line, as far as
// their results lie at equal distances, and are cut into fewer tiles.
Geometry flattened(Geometry g, const int64_t (&steps)[4]) {
  for (int d = 0; d < 3; ++d)
    if (g.kernel[d] > 1 || g.stride[d] > 1 || g.in[d] != g.out[d]) return g;
  for (int d = 1; d >= 0; --d) {
    if (g.out[d] > 1 && steps[d + 1] != g.out[2] * steps[3]) return g;
    g.in[2] = g.out[2] *= g.out[d];
    g.in[d] = g.out[d] = 1;
  }
  if (steps[0] != g.out[2] * steps[3]) return g;
  g.in[2] = g.out[2] *= g.batch;
  g.batch = 1;
  return g;
}

const lookup::Table& table_of(int64_t bits, float low) {
  return bits == 1 ? lookup::signs : low < 0 ? lookup::signed_pairs : lookup::unsigned_pairs;
}

// Null: not by lookup. For a pixel or two it does not pay to make panels of the weight.
// g: its channels are bits, as in a call.
const lookup::Lookup* lookup_for(const Geometry& g, int64_t bits, const lookup::Table& table) {
  constexpr int64_t FEWEST = 6;
  if (current_isa() != AVX2 || g.batch * g.out_pixels() < FEWEST) return nullptr;
  const lookup::Lookup* const lookup = bits == 1 ? &lookup::of_signs : &lookup::of_pairs;
  const int64_t bytes = g.taps() * lookup::bytes_of(g.in_channels / g.groups);
  return lookup->entries * bytes <= table.most ? lookup : nullptr;
}

// Of products of `channels` channels. At 2 bits, an entry counts from the least once, and less twice.
int32_t tap_total(int64_t channels, int64_t bits, const lookup::Table& table) {
  return static_cast<int32_t>(bits == 1 ? channels : -table.least * lookup::bytes_of(channels * bits));
}

void fill_with_nan(const Geometry& g, Dtype dtype, void* out) {
  const int64_t count = g.batch * g.out_channels * g.out_pixels();
  if (dtype == FLOAT32)
    std::fill_n(static_cast<float*>(out), count, std::numeric_limits<float>::quiet_NaN());
  else
    std::fill_n(static_cast<uint16_t*>(out), count, dtype == BFLOAT16 ? 0x7fc0 : 0x7e00);
}

}  // namespace

// Whether be_binary_conv has the product: always at 1 bit.
BE_EXPORT int be_binary_has(const Geometry* geometry, int bits) {
  Geometry g = *geometry;
  g.in_channels *= bits;
  return bits == 1 || lookup_for(g, bits, table_of(bits, 0)) != nullptr;
}

// low: of the activation, at 2 bits. out, dense: float(total) * (channel_scale * *scale) + bias. bias, poison: null for
// none. Where a float is not finite, or *poison is NaN, all of it is NaN.
BE_EXPORT void be_binary_conv(const BinaryArguments* a, const void* x, const float* scale, const float* low,
                              const uint32_t* weights, const float* channel_scale, const float* bias,
                              const float* poison, void* out) {
  Geometry g = a->geometry;
  const lookup::Table& table = table_of(a->bits, *low);
  const int32_t per_tap = tap_total(g.in_channels / g.groups, a->bits, table);
  const int threads = static_cast<int>(a->threads);
  const Dtype dtype = static_cast<Dtype>(a->out_dtype), x_dtype = static_cast<Dtype>(a->x_dtype);
  if (poison && *poison != *poison) return fill_with_nan(g, dtype, out);
  const std::unique_ptr<float[]> factor(new float[g.out_channels]);
  for (int64_t o = 0; o < g.out_channels; ++o) factor[o] = channel_scale[o] * *scale;

  const int64_t *s = a->out_strides, steps[4] = {s[0], s[2], s[3], s[4]};
  const int64_t sample = a->x_strides[0] * (x_dtype == FLOAT32 ? 4 : 2), element = dtype == FLOAT32 ? 4 : 2;
  const int64_t lot = samples_at_once(*a, std::max<int64_t>(1, sample));
  std::vector<Box> all;
  g.in_channels *= a->bits;
  const lookup::Lookup* const lookup = lookup_for(g, a->bits, table);
  for (int64_t first = 0; first < a->geometry.batch; first += lot) {
    g.batch = std::min(lot, a->geometry.batch - first);
    const Geometry flat = flattened(g, steps);
    const uint8_t* from = static_cast<const uint8_t*>(x) + first * sample;
    const Image image = a->codes ? Image(g, from, threads)
                                 : Image(g, from, x_dtype, a->x_strides, a->bits, *low, 1 / *scale, threads);
    if (image.odd()) return fill_with_nan(a->geometry, dtype, out);
    if (first == 0 || g.batch != lot)
      all = boxes(flat, lookup ? lookup->pixels : MOST_PIXELS, lookup && lookup->partners,
                  s[1] == 1 || (lookup && dtype == FLOAT32));
    const Entries entries(flat, all, image.words(), lookup, threads);
    const int64_t next = std::min(lot, a->geometry.batch - first - g.batch);
    uint8_t* const to = static_cast<uint8_t*>(out) + first * s[0] * element;
    multiply_all({flat, all, image.words(), lookup, &table, entries, weights, factor.get(), bias, to, dtype, s[1],
                  {s[0], s[2], s[3], s[4]}, per_tap, from + g.batch * sample, a->codes ? 0 : next * sample},
                 threads);
  }
}

BE_EXPORT int be_binary_planned(const Planned* p, const void* x, void* out) {
  if (p->watch.changed()) return CHANGED;
  be_binary_conv(static_cast<const BinaryArguments*>(p->arguments), x, p->scale, p->low,
                 static_cast<const uint32_t*>(p->weights), p->factor, p->bias, nullptr, out);
  return DONE;
}
