#include "winograd/winograd.h"

#include <algorithm>

#include "qconv/areas.h"
#include "qconv/call.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "runtime/round_up.h"
#include "winograd/grid.h"

namespace bitorch_engine {
namespace winograd {

const Kernel<WeightsFunction> weights_kernel{"winograd.weights", {weights_scalar, nullptr, BE_X86(weights_avx2)}};
const Kernel<PixelsFunction> pixels_kernel{"winograd.pixels", {pixels_scalar, nullptr, BE_X86(pixels_avx2)}};
const Kernel<MultiplyFunction> multiply_kernel{"winograd.multiply", {multiply_scalar, nullptr, BE_X86(multiply_avx2)}};
const Kernel<TotalsFunction> totals_kernel{"winograd.totals", {totals_scalar, nullptr, BE_X86(totals_avx2)}};

namespace {

// Tiles and channels that are handled at a time: what is made of them is to stay in the L2 cache.
constexpr int64_t TILES = 54, CHANNELS = 64;
static_assert(9 * 255 * 128 * CHANNELS < 1 << 25, "so many channels are added up at a time");
constexpr int64_t GRAIN = 6;  // tiles that are multiplied together

// Channels whose products add up to results of 26 bits, a multiple of CHANNELS.
int64_t channels_of_a_span(int64_t largest, int64_t largest_weight) {
  return ((1 << 25) - 1) / (9 * largest * largest_weight) / CHANNELS * CHANNELS;
}

// Compares both ways in vector instructions that a block of 16 results takes, by and large. The numbers are fitted to
// times on Zen 3 of 8 to 512 channels, maps of 7x7 to 56x56 and batches of 1 to 8, which they tell to a tenth.
bool faster(const Product& p, const Phase& phase, const std::vector<Region>& regions, int64_t pairs) {
  const int64_t tiles = Grid(p, phase).tiles, panels = (tiles + TILES - 1) / TILES;
  const double channels = static_cast<double>(round_up(p.image_depth, UNIT));
  const double of_pixels = 17.5 * channels / static_cast<double>(p.blocks() * BLOCK), of_totals = 28;  // of a tile
  const double tiled = channels * (4.6 * tiles + 11.0 * panels) + (of_pixels + of_totals) * tiles;
  int64_t taps = 0;  // that are read, of all pixels
  for (const Region& region : regions) taps += p.batch * region.pixels() * region.taps();
  const double each = pairs >= 8 ? 0.0625 : pairs >= 4 ? 0.07 : pairs >= 2 ? 0.08 : 0.13;
  return 1.03 * tiled < each * taps * p.image_depth;
}

// Tiles of one line that follow each other.
struct Segment {
  Position first;
  int64_t count;
};

// One thread's share: tiles first_tile .. last_tile - 1 and blocks first_block .. last_block - 1 of one group.
class ForwardPart {
 public:
  ForwardPart(const Call& call, const Phase& phase, const int32_t* zero_sum, int64_t group)
      : call_(call),
        p_(call.product),
        phase_(phase),
        grid_(p_, phase),
        group_(group),
        depth_(round_up(p_.image_depth, UNIT)),
        epilogue_(call.epilogue) {
    epilogue_.zero_sum = zero_sum + group * p_.blocks() * BLOCK;
    epilogue_.factor += group * p_.result_channels;
    if (epilogue_.bias) epilogue_.bias += group * p_.result_channels;
  }

  void run(int64_t first_tile, int64_t last_tile, int64_t first_block, int64_t last_block) {
    const int64_t panels = (last_tile - first_tile + TILES - 1) / TILES;
    tiles_ = round_up((last_tile - first_tile + panels - 1) / panels, GRAIN);
    pitch_ = pitch_of(tiles_ * CHANNELS);
    pixels_ = new_buffer<int16_t>(round_up(depth_, CHANNELS) / CHANNELS * PLACES * pitch_);
    weights_ = new_buffer<int16_t>(PLACES * pitch_of(CHANNELS * BLOCK));
    codes_ = new_buffer<int8_t>(call_.bits == 8 ? 0 : phase_.depth * BLOCK);
    sums_ = new_buffer<int32_t>(PLACES * tiles_ * BLOCK);
    totals_ = new_buffer<int32_t>(tiles_ * SIDE * SIDE * COLUMNS);
    const std::unique_ptr<Segment[]> segments(new Segment[tiles_]);
    constexpr int64_t STEP = COLUMNS / BLOCK;
    for (int64_t first = first_tile; first < last_tile; first += tiles_) {
      const int64_t count = std::min(tiles_, last_tile - first);
      Segment* end = segments.get();
      for (int64_t tile = first; tile < first + count; tile += end++->count) {
        const Position at = grid_.at(tile);
        *end = {at, std::min(grid_.columns - at.column, first + count - tile)};
      }
      read(first, count);
      for (int64_t b = first_block; b < last_block; b += STEP) {
        const int64_t blocks = std::min(STEP, last_block - b);
        for (int64_t i = 0; i < blocks; ++i) multiply(b + i, count, segments.get(), end, totals_.get() + i * BLOCK);
        write(segments.get(), end, b * BLOCK, std::min(blocks * BLOCK, p_.result_channels - b * BLOCK));
      }
    }
  }

 private:
  const Call& call_;
  const Product& p_;
  const Phase& phase_;
  const Grid grid_;
  const int64_t group_, depth_;
  Epilogue epilogue_;
  int64_t tiles_, pitch_;
  Buffer<int16_t> pixels_, weights_;
  Buffer<int8_t> codes_;
  Buffer<int32_t> sums_, totals_;

  // Transforms what tiles first .. first + count - 1 read.
  void read(int64_t first, int64_t count) {
    const auto transform = pixels_kernel.pick();
    const uint8_t* lines[READ];
    int64_t columns[READ];
    for (int64_t tile = 0; tile < count; ++tile) {
      grid_.locate(p_, phase_, call_.image + group_ * p_.image_depth, first + tile, lines, columns);
      int16_t* to = pixels_.get();
      for (int64_t c = 0; c < depth_; c += CHANNELS, to += PLACES * pitch_) {
        const int64_t depth = std::min(CHANNELS, depth_ - c);
        transform(lines, columns, depth, to + tile * depth, pitch_);
        for (const uint8_t*& line : lines) line += CHANNELS;
      }
    }
  }

  // The totals of one block, in its columns of `totals`.
  void multiply(int64_t block, int64_t count, const Segment* segment, const Segment* end, int32_t* totals) {
    const int64_t block_values = phase_.depth * BLOCK;
    const int64_t start = phase_.weights + (group_ * p_.blocks() + block) * block_values;
    const int8_t* codes = reinterpret_cast<const int8_t*>(call_.weights) + start;
    if (call_.bits != 8) {
      decode_kernel.pick()(call_.weights + start / 8 * call_.bits, block_values, call_.bits, codes_.get());
      codes = codes_.get();
    }
    const auto transform_weights = weights_kernel.pick();
    const auto multiply = multiply_kernel.pick();
    const auto transform_totals = totals_kernel.pick();
    const int64_t span = channels_of_a_span(call_.largest, call_.largest_weight);
    const int16_t* pixels = pixels_.get();
    for (int64_t c = 0; c < depth_; pixels += PLACES * pitch_) {
      const int64_t depth = std::min(CHANNELS, p_.image_depth - c), padded = std::min(CHANNELS, depth_ - c);
      transform_weights(codes + c * BLOCK, p_.image_depth * BLOCK, depth, padded, weights_.get());
      multiply(pixels, pitch_, weights_.get(), count, padded, c % span > 0, sums_.get());
      c += padded;
      if (c % span > 0 && c < depth_) continue;
      int64_t first = 0;
      int32_t* to = totals;
      for (const Segment* s = segment; s < end; ++s) {
        transform_totals(sums_.get(), count, first, s->count, c > span, to);
        first += s->count;
        to += s->count * SIDE * SIDE * COLUMNS;
      }
    }
  }

  void write(const Segment* segment, const Segment* end, int64_t first, int64_t channels) {
    const auto finish = finish_kernel.pick();
    const int32_t* totals = totals_.get();
    uint8_t* const out = call_.out + group_ * p_.result_channels * call_.out_channel * call_.element_bytes;
    for (; segment < end; ++segment) {
      const float* factor = call_.sample_factor ? call_.sample_factor + segment->first.sample : nullptr;
      const int64_t y = segment->first.line * SIDE, x = segment->first.column * SIDE;
      const int64_t count = std::min(segment->count * SIDE, phase_.count[2] - x);
      for (int64_t line = 0; line < SIDE; ++line, totals += segment->count * SIDE * COLUMNS) {
        if (y + line >= phase_.count[1]) continue;
        const int64_t of_line = segment->first.sample * call_.out_sample + (y + line) * call_.out_step[1];
        const int64_t place = of_line + x * call_.out_step[2];
        const Stretch row{count, out + place * call_.element_bytes, call_.out_step[2] * call_.element_bytes, factor};
        finish(totals, row, first, channels, epilogue_, call_.out_channel);
      }
    }
  }
};

}  // namespace

bool is_plain(const Product& p, const Phase& phase) {
  if (current_isa() != AVX2 || p.phases.size() != 1 || p.result[0] != 1) return false;
  for (int d = 0; d < 3; ++d)
    if (phase.tap_count[d] != (d == 0 ? 1 : 3) || p.base_step[d] != 1 || p.result_step[d] != 1) return false;
  const int64_t *first = phase.taps[0].shift, *last = phase.taps.back().shift;
  return last[1] - first[1] == 2 && last[2] - first[2] == 2;  // not dilated
}

bool suits(const Product& p, const Phase& phase, const std::vector<Region>& regions, int64_t pairs) {
  return is_plain(p, phase) && faster(p, phase, regions, pairs);
}

void multiply_all(const Call& call, const Phase& phase, int threads) {
  const Product& p = call.product;
  const Areas whole_phase(p, phase, {whole(phase)}, call.sums, call.zero);
  const Grid grid(p, phase);
  for (int64_t group = 0; group < p.groups; ++group) {
    const auto part = [&](int64_t first_tile, int64_t last_tile, int64_t first_block, int64_t last_block) {
      ForwardPart(call, phase, whole_phase.begin()->zero_sum, group)
          .run(first_tile, last_tile, first_block, last_block);
    };
    // Threads share the tiles; where those are few, the channels.
    if (grid.tiles >= 4 * GRAIN * threads || p.blocks() < 2 * threads)
      parallel_for(grid.tiles, GRAIN, threads, [&](int64_t first, int64_t last) { part(first, last, 0, p.blocks()); });
    else
      parallel_for(p.blocks(), 1, threads, [&](int64_t first, int64_t last) { part(0, grid.tiles, first, last); });
  }
}

}  // namespace winograd
}  // namespace bitorch_engine

using namespace bitorch_engine;

// Whether codes of x_bits times weights of w_bits go this way. For tests.
BE_EXPORT int be_winograd_suits(const Geometry* geometry, int scatter, int x_bits, int w_bits) {
  const Product p(*geometry, scatter, true);
  const int64_t largest = x_bits == 1 ? 2 : (1 << x_bits) - 1, pairs = pairs_that_fit(largest, 1 << (w_bits - 1));
  return winograd::suits(p, p.phases[0], regions_in_use(p, p.phases[0], pairs), pairs);
}
