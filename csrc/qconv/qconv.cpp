#include "qconv/qconv.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "qconv/areas.h"
#include "qconv/call.h"
#include "qconv/image.h"
#include "qconv/product.h"
#include "qconv/results.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "winograd/winograd.h"

namespace bitorch_engine {

const Kernel<MultiplyFunction> multiply_kernel{
    "qconv.multiply",
    {multiply_scalar, nullptr, BE_X86(multiply_avx2), BE_X86(multiply_avx512), BE_X86(multiply_amx)}};
const Kernel<DecodeFunction> decode_kernel{
    "qconv.decode", {decode_scalar, nullptr, BE_X86(decode_avx2), BE_X86(decode_avx512)}};
const Kernel<FinishFunction> finish_kernel{
    "qconv.finish", {finish_scalar, nullptr, BE_X86(finish_avx2), BE_X86(finish_avx512)}};

namespace {

// Decoded weights that are used together: they should stay in the L2 cache, of which processors without AVX-512 have
// less.
int64_t panel_bytes() { return current_isa() < AVX512 ? 1 << 18 : 1 << 20; }

// Pixels whose bases are equally far apart in the image.
struct Line {
  int64_t base, count;
};

// Pixels of one area that are handled together, of those in Places.
struct Piece {
  const Area* area;
  int64_t rows, stretches;
};

constexpr int64_t MOST_ROWS = 4 * ROWS;  // where totals become results at once; see Runs

// Result pixels that are handled together: where they read and where they write.
struct Places {
  Line lines[MOST_ROWS];
  Stretch stretches[MOST_ROWS];
  Piece pieces[MOST_ROWS];
  int64_t line_count, stretch_count, piece_count, rows;
};

// The result pixels of one phase, area by area, in each all samples in a row.
struct Pixels {
  const Call& call;
  const Phase& phase;
  const Areas& areas;

  // The places of pixels from `first` on, at most `most`, before `last_pixel`. The results have their first channel at
  // `out`.
  // gap: 0, or so many pixels after each line, which have no results, are taken along: the lines of a plane are one
  // then. places.rows counts those too. Returns the pixel where it ended.
  int64_t locate(int64_t first, int64_t last_pixel, int64_t most, int64_t gap, uint8_t* out, Places& places) const {
    constexpr int64_t WHOLE = 12;  // pixels: whole tiles, of each size that they have
    places.line_count = places.stretch_count = places.piece_count = places.rows = 0;
    for (const Area& area : areas) {
      if (first >= area.last) continue;
      const int64_t last = std::min(last_pixel, area.last);
      int64_t room = most - places.rows;
      if (areas.several() && last - first > room) room -= room % WHOLE;
      if (first == last || room == 0) break;
      const Piece before{&area, places.rows, places.stretch_count};
      first = locate_in(area, first, last, places.rows + room, gap, out, places);
      places.pieces[places.piece_count++] = {&area, places.rows - before.rows, places.stretch_count - before.stretches};
    }
    return first;
  }

 private:
  // As above, of one area. Adds to places.
  int64_t locate_in(const Area& area, int64_t first, int64_t last_pixel, int64_t most, int64_t gap, uint8_t* out,
                    Places& places) const {
    const Product& p = call.product;
    const Span *const span = area.region.span;
    const int64_t c[3] = {span[0].count, span[1].count, span[2].count}, *s = p.base_step;
    int64_t at[3], rest = first - area.first;
    for (int d = 2; d >= 0; --d) {
      at[d] = rest % c[d];
      rest /= c[d];
    }
    int64_t sample = rest;
    Stretch* const of_area = places.stretches + places.stretch_count;
    bool joined = false;
    while (first < last_pixel && places.rows + (joined ? gap : 0) < most) {
      const int64_t z = span[0].first + at[0], y = span[1].first + at[1], x = span[2].first + at[2];
      const int64_t line = (sample * p.padded[0] + z * s[0] + p.before[0]) * p.padded[1] + y * s[1] + p.before[1];
      const int64_t place = sample * call.out_sample + (phase.first[0] + z * p.result_step[0]) * call.out_step[0] +
                            (phase.first[1] + y * p.result_step[1]) * call.out_step[1] +
                            (phase.first[2] + x * p.result_step[2]) * call.out_step[2];
      const float* sample_factor = call.sample_factor ? call.sample_factor + sample : nullptr;
      const int64_t count = std::min({last_pixel - first, c[2] - at[2], most - places.rows - (joined ? gap : 0)});
      if (joined) {
        places.rows += gap;
        places.lines[places.line_count - 1].count += gap + count;
        places.stretches[places.stretch_count++] = {gap, nullptr, 0, nullptr};
      } else {
        places.lines[places.line_count++] = {(line * p.padded[2] + x * s[2] + p.before[2]) * p.pixel_bytes(), count};
      }
      const Stretch next{count, out + place * call.element_bytes,
                         p.result_step[2] * call.out_step[2] * call.element_bytes, sample_factor};
      Stretch* const last = places.stretches + places.stretch_count - 1;
      if (last >= of_area && last->out && last->sample_factor == sample_factor && follows(*last, next))
        last->count += count;
      else
        places.stretches[places.stretch_count++] = next;
      first += count;
      places.rows += count;
      at[2] = 0;
      joined = gap > 0 && at[1] + 1 < c[1];
      if (++at[1] < c[1]) continue;
      at[1] = 0;
      if (++at[0] < c[0]) continue;
      at[0] = 0;
      ++sample;
    }
    return first;
  }

  // Whether two stretches are one. Single pixels, as those of a column, are as far apart as they happen to be.
  static bool follows(Stretch& last, const Stretch& next) {
    if (last.count == 1 && next.count == 1) last.step = next.out - last.out;
    return last.out + last.count * last.step == next.out && (next.count == 1 || next.step == last.step);
  }
};

// How the matrix unit reads pixels: 64 bytes each of up to 16 that are equally far apart. A tile of fewer rows takes
// almost as much less time: a line of pixels is cut into equal runs. Where fewer runs come of it, the padding between
// two lines is multiplied too, and they are joined: 56 pixels by two are cut into 16, not 14, and 7 by two into 16, not
// 7. Where lines are short and padding is more than a quarter, or the depth is not whole, the bytes that a pixel reads
// are gathered into one row first.
struct Runs {
  static constexpr int64_t LONGEST = 16, SHORTEST = 11;
  bool used, gather = false;
  int64_t longest = LONGEST, step;
  int64_t gap = 0;      // see Pixels::locate
  int64_t rows = ROWS;  // handled at a time

  Runs(const Product& p, const Phase& phase, int64_t depth) : used(current_isa() == AMX) {
    const int64_t* c = phase.count;
    const int64_t lines_apart = p.padded[2] * p.base_step[1];
    const int64_t width = lines_apart / p.base_step[2];  // of a line, in steps
    step = p.base_step[2] * p.pixel_bytes();
    if (!used) return;
    const bool even = width * p.base_step[2] == lines_apart, seamless = even && width == c[2];
    const int64_t plane = c[1] * width - (width - c[2]);  // with what is between its lines
    const bool joins = even && !seamless && 4 * c[2] >= 3 * width && fewest(plane, 1) < c[1] * fewest(c[2], 1);
    gather = depth % DEPTH != 0 || (!seamless && !joins && equal(c[2], 1) < SHORTEST);
    if (joins && !gather) gap = width - c[2];
    if (gather || seamless) longest = equal(p.batch * c[0] * c[1] * c[2], 2);
    else longest = gap > 0 ? equal(plane, 2) : equal(c[2], 1);
    // Pairs of runs. The matrix unit is busy with the next ones while some become results, but for the last.
    rows = (gather ? ROWS : MOST_ROWS) / (2 * longest) * (2 * longest);
  }

  // The number of runs that `pixels` are cut into, a multiple of `unit`, and their length.
  static int64_t fewest(int64_t pixels, int64_t unit) {
    return (pixels + unit * LONGEST - 1) / (unit * LONGEST) * unit;
  }
  static int64_t equal(int64_t pixels, int64_t unit) {
    const int64_t runs = fewest(pixels, unit);
    return (pixels + runs - 1) / runs;
  }

  int64_t cut(const Places& places, uint8_t* lengths) const {
    int64_t runs = 0;
    for (const Line *line = places.lines, *end = line + places.line_count; line < end;) {
      int64_t count = line->count;
      for (++line; line < end && (gather || line->base == line[-1].base + line[-1].count * step); ++line)
        count += line->count;
      for (; count > 0; count -= longest) lengths[runs++] = static_cast<uint8_t>(std::min(count, longest));
    }
    return runs;
  }
};

// The bytes that one pixel reads, in a row.
void gather(const uint8_t* base, const Area& area, uint8_t* row) {
  for (int64_t t = 0; t < area.read_count; ++t, row += area.depth)
    std::memcpy(row, base + area.reads[t].image, area.depth);
}

// One thread's share: result pixels first_pixel .. last_pixel, blocks first_block .. last_block of one group and phase.
void multiply_part(const Call& call, const Phase& phase, const Areas& areas, int64_t group, int64_t first_pixel,
                   int64_t last_pixel, int64_t first_block, int64_t last_block) {
  const Product& p = call.product;
  const Pixels pixels{call, phase, areas};
  const auto multiply = multiply_kernel.pick();
  const auto decode = decode_kernel.pick();
  const auto finish = finish_kernel.pick();
  const int64_t block_bytes = phase.depth * BLOCK;
  const Runs runs(p, phase, areas.begin()->depth);

  constexpr int64_t STEP = COLUMNS / BLOCK;
  // Where all pixels are handled at once, nothing is gained by more blocks than they are multiplied with together.
  const bool once = (last_pixel - first_pixel) * (phase.count[2] + runs.gap) <= runs.rows * phase.count[2];
  const int64_t most_blocks = once ? STEP : panel_bytes() / std::max<int64_t>(block_bytes, 1) & ~(STEP - 1);
  const int64_t panel_blocks = std::max(STEP, most_blocks);
  const bool packed = call.bits != 8;
  const auto panel = new_buffer<int8_t>(packed ? std::min(panel_blocks, last_block - first_block) * block_bytes : 0);
  const auto gathered = new_buffer<uint8_t>(runs.gather ? runs.rows * phase.depth : 0);
  const Read gathered_read{0, 0};
  alignas(64) int32_t totals[ROWS * COLUMNS];
  Places places;
  const uint8_t* rows[MOST_ROWS];
  uint8_t lengths[MOST_ROWS];
  Setup setup;
  // Of the group's first channel.
  Results results{finish, call.epilogue, nullptr, 0, 0, call.out_channel};
  results.epilogue.factor += group * p.result_channels;
  if (results.epilogue.bias) results.epilogue.bias += group * p.result_channels;
  uint8_t* const first_out = call.out + group * p.result_channels * call.out_channel * call.element_bytes;
  const uint8_t* const image = call.image + group * p.image_depth;
  Tile tile{rows, 0, nullptr, 0, 0, nullptr, block_bytes, 0, totals, lengths, 0, call.pairs(), &results, &setup};
  int64_t located = -1, next = first_pixel;

  for (int64_t b0 = first_block; b0 < last_block; b0 += panel_blocks) {
    const int64_t b1 = std::min(last_block, b0 + panel_blocks);
    const int64_t start = phase.weights + (group * p.blocks() + b0) * block_bytes;
    const int8_t* weights = reinterpret_cast<const int8_t*>(call.weights) + start;
    if (packed) {
      decode(call.weights + start / 8 * call.bits, (b1 - b0) * block_bytes, call.bits, panel.get());
      weights = panel.get();
    }
    for (int64_t first = first_pixel; first < last_pixel; first = next) {
      if (first != located) {
        located = first;
        next = pixels.locate(first, last_pixel, runs.rows, runs.gap, first_out, places);
        if (runs.used) tile.run_count = runs.cut(places, lengths);
        for (int64_t i = 0, row = 0; i < places.line_count; ++i)
          for (int64_t k = 0; k < places.lines[i].count; ++k)
            rows[row++] = image + places.lines[i].base + k * runs.step;
        if (runs.gather) {
          const Area& all = *areas.begin();
          const int64_t read = all.read_count * all.depth;
          for (int64_t i = 0; i < places.rows; ++i) {
            uint8_t* row = gathered.get() + i * phase.depth;
            gather(rows[i], all, row);
            std::memset(row + read, 0, phase.depth - read);
            rows[i] = row;
          }
        }
      }
      for (int64_t b = b0; b < b1; b += STEP) {
        tile.blocks = std::min(STEP, b1 - b);
        tile.weights = weights + (b - b0) * block_bytes;
        results.first = b * BLOCK;
        results.channels = std::min(tile.blocks * BLOCK, p.result_channels - b * BLOCK);
        tile.rows = rows;
        results.stretches = places.stretches;
        for (const Piece* piece = places.pieces; piece < places.pieces + places.piece_count; ++piece) {
          const Area& area = *piece->area;
          tile.count = piece->rows;
          tile.reads = runs.gather ? &gathered_read : area.reads;
          tile.read_count = runs.gather ? 1 : area.read_count;
          tile.depth = runs.gather ? phase.depth : area.depth;
          results.epilogue.zero_sum = area.zero_sum + group * p.blocks() * BLOCK;
          multiply(tile);
          tile.rows += piece->rows;
          results.stretches += piece->stretches;
        }
      }
    }
  }
}

void multiply_all(const Call& call, int threads) {
  const Product& p = call.product;
  for (const Phase& phase : p.phases) {
    const std::vector<Region> regions = regions_in_use(p, phase, call.pairs());
    if (winograd::suits(p, phase, regions, call.pairs())) {
      winograd::multiply_all(call, phase, threads);
      continue;
    }
    const Areas areas(p, phase, regions, call.sums, call.zero);
    const int64_t pixels = areas.pixels();
    for (int64_t group = 0; group < p.groups; ++group) {
      // Threads share the pixels; where those are few, the channels.
      if (pixels >= 2 * ROWS * threads || p.blocks() < 2 * COLUMNS / BLOCK) {
        parallel_for(pixels, 48, threads, [&](int64_t first, int64_t last) {
          multiply_part(call, phase, areas, group, first, last, 0, p.blocks());
        });
      } else {
        parallel_for(p.blocks(), COLUMNS / BLOCK, threads, [&](int64_t first, int64_t last) {
          multiply_part(call, phase, areas, group, 0, pixels, first, last);
        });
      }
    }
  }
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// x: floats, a packed stream of codes, or signed gradient codes.  scale, low: of the activation quantizer.
// factor: one float a result channel; where x are floats it is multiplied by *scale here.
// sums: of be_qconv_arrange.  poison: added to every result, or null.
BE_EXPORT int be_qconv(const QconvArguments* a, const void* x, const float* scale, const float* low,
                       const uint8_t* weights, const int32_t* sums, const float* factor, const float* sample_factor,
                       const float* bias, const float* poison, void* out) {
  const Product p(a->geometry, a->scatter, a->rows_are_results);
  const int threads = static_cast<int>(a->threads);
  const Image image(p, static_cast<SourceKind>(a->source), x, static_cast<Dtype>(a->x_dtype), a->x_sample, a->x_channel,
                    a->x_step, static_cast<int>(a->x_bits), scale ? *scale : 1.0f, low ? *low : 0.0f, threads);
  const int64_t channels = p.groups * p.result_channels;
  std::unique_ptr<float[]> factors;
  if (scale) {
    factors.reset(new float[channels]);
    for (int64_t i = 0; i < channels; ++i) factors[i] = factor[i] * *scale;
    factor = factors.get();
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float added = (poison ? *poison : 0.0f) + (image.odd() ? nan : 0.0f);
  const Epilogue epilogue{nullptr, factor, bias, added, static_cast<Dtype>(a->out_dtype),
                          a->out_bytes != 0, static_cast<int>(a->out_zero)};
  const int64_t element = a->out_bytes ? 1 : a->out_dtype == FLOAT32 ? 4 : 2;
  const Call call{p, image.bytes(), weights, static_cast<int>(a->w_arranged_bits),
                  image.largest(), int64_t{1} << (a->w_bits - 1), sums, image.zero(), epilogue, sample_factor,
                  static_cast<uint8_t*>(out), a->out_sample, a->out_channel,
                  {a->out_step[0], a->out_step[1], a->out_step[2]}, element};
  multiply_all(call, threads);
  return DONE;
}

BE_EXPORT int be_qconv_planned(const Planned* p, const void* x, void* out) {
  if (p->watch.changed()) return CHANGED;
  return be_qconv(static_cast<const QconvArguments*>(p->arguments), x, p->scale, p->low,
                  static_cast<const uint8_t*>(p->weights), p->sums, p->factor, nullptr, p->bias, nullptr, out);
}
