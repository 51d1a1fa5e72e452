#include "winograd/gradient.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "qconv/product.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"
#include "winograd/grid.h"

namespace bitorch_engine {
namespace winograd {

const Kernel<PixelPairFunction> pixel_pair_kernel{"winograd.pixel_pair",
                                                  {pixel_pair_scalar, nullptr, BE_X86(pixel_pair_avx2)}};
const Kernel<GradientPairFunction> gradient_pair_kernel{"winograd.gradient_pair",
                                                        {gradient_pair_scalar, nullptr, BE_X86(gradient_pair_avx2)}};
const Kernel<MultiplyPairsFunction> multiply_pairs_kernel{
    "winograd.multiply_pairs", {multiply_pairs_scalar, nullptr, BE_X86(multiply_pairs_avx2)}};
const Kernel<TapsFunction> taps_kernel{"winograd.taps", {taps_scalar, nullptr, BE_X86(taps_avx2)}};

namespace {

constexpr int64_t TILES = 64;  // at a time: the sums of so many have 26 bits, and both sides stay in the L2 cache
static_assert(TILES * SQUARE * 255 * 128 < 1 << 25, "so many tiles are added up at a time");

// The totals of one group that some tiles have, of blocks first_block .. last_block - 1 of 16 results.
class GradientPart {
 public:
  GradientPart(const Product& p, const uint8_t* image, const int8_t* gradients, int64_t group, int64_t first_block,
               int64_t last_block)
      : p_(p),
        phase_(p.phases[0]),
        grid_(p, phase_),
        image_(image + group * p.image_depth),
        gradients_(gradients + group * p.result_channels),
        first_block_(first_block),
        last_block_(last_block),
        channel_blocks_((p.image_channels + UNIT - 1) / UNIT),
        pitch_(pitch_of(TILES * UNIT)),
        block_(PLACES * pitch_),
        pixels_(new_buffer<int16_t>(channel_blocks_ * block_)),
        of_gradients_(new_buffer<int16_t>((last_block - first_block) * block_)),
        gradient_sums_(new_buffer<int32_t>((last_block - first_block) * UNIT)),
        sums_(new_buffer<int32_t>(PLACES * UNIT * UNIT)) {}

  // totals: of all of the group. Those of the blocks are overwritten.
  void run(int64_t first_tile, int64_t last_tile, int zero, int32_t* totals) {
    for (int64_t first = first_tile; first < last_tile; first += TILES) {
      const int64_t count = std::min(TILES, last_tile - first);
      for (int64_t c = 0; c < channel_blocks_; ++c) fill_pixels(c, first, count);
      for (int64_t b = first_block_; b < last_block_; ++b) fill_gradients(b, first, count);
      // STRIP blocks of results stay in the L2 cache while those of channels pass by.
      constexpr int64_t STRIP = 4;
      for (int64_t strip = first_block_; strip < last_block_; strip += STRIP)
        for (int64_t c = 0; c < channel_blocks_; ++c)
          for (int64_t b = strip; b < std::min(strip + STRIP, last_block_); ++b)
            add_block(b, c, count, zero, first == first_tile, totals);
    }
  }

 private:
  const Product& p_;
  const Phase& phase_;
  const Grid grid_;
  const uint8_t* image_;
  const int8_t* gradients_;
  const int64_t first_block_, last_block_, channel_blocks_, pitch_, block_;
  // Of a block of 16 channels after the other.
  const Buffer<int16_t> pixels_, of_gradients_;
  const Buffer<int32_t> gradient_sums_, sums_;

  // Tiles first .. first + count - 1; where their number is odd, with any other.
  void fill_pixels(int64_t c, int64_t first, int64_t count) {
    const auto transform = pixel_pair_kernel.pick();
    const uint8_t* lines[2][READ];
    int64_t columns[2][READ];
    for (int64_t t = 0; t < count; t += 2) {
      for (int64_t i = 0; i < 2; ++i)
        grid_.locate(p_, phase_, image_ + c * UNIT, first + std::min(t + i, count - 1), lines[i], columns[i]);
      transform(lines, columns, pixels_.get() + c * block_ + t * UNIT, pitch_);
    }
  }

  // Where their number is odd, with one of gradients that are 0.
  void fill_gradients(int64_t b, int64_t first, int64_t count) {
    const auto transform = gradient_pair_kernel.pick();
    int16_t* const block = of_gradients_.get() + (b - first_block_) * block_;
    int32_t* const sums = gradient_sums_.get() + (b - first_block_) * UNIT;
    int8_t two[2][SQUARE][UNIT];
    std::memset(sums, 0, UNIT * sizeof *sums);
    for (int64_t t = 0; t < count; t += 2) {
      for (int64_t i = 0; i < 2; ++i) {
        if (t + i < count) copy(b, first + t + i, two[i]);
        else std::memset(two[i], 0, sizeof two[i]);
      }
      transform(two, block + t * UNIT, pitch_);
      const int16_t* all = block + t * UNIT + (READ + 1) * pitch_;  // the sum of a tile is one of the 36
      for (int64_t o = 0; o < UNIT; ++o) sums[o] += all[2 * o] + all[2 * o + 1];
    }
  }

  // The gradients of a tile. Of pixels and channels that are not there, 0.
  void copy(int64_t b, int64_t tile, int8_t (*to)[UNIT]) const {
    const Position at = grid_.at(tile);
    const int64_t all = p_.groups * p_.result_channels, channels = std::min(UNIT, p_.result_channels - b * UNIT);
    const int64_t height = std::min(SIDE, phase_.count[1] - at.line * SIDE);
    const int64_t width = std::min(SIDE, phase_.count[2] - at.column * SIDE);
    const int64_t line = (at.sample * phase_.count[1] + at.line * SIDE) * phase_.count[2] + at.column * SIDE;
    const int8_t* from = gradients_ + line * all + b * UNIT;
    if (height * width * channels < SQUARE * UNIT) std::memset(to, 0, SQUARE * UNIT);
    for (int64_t y = 0; y < height; ++y, from += phase_.count[2] * all)
      for (int64_t x = 0; x < width; ++x) {
        if (channels == UNIT) std::memcpy(to[y * SIDE + x], from + x * all, UNIT);
        else std::memcpy(to[y * SIDE + x], from + x * all, channels);
      }
  }

  void add_block(int64_t b, int64_t c, int64_t count, int zero, bool first, int32_t* totals) {
    alignas(64) int32_t taps[UNIT][TAPS][UNIT];
    multiply_pairs_kernel.pick()(of_gradients_.get() + (b - first_block_) * block_, pixels_.get() + c * block_,
                                 (count + 1) / 2, pitch_, sums_.get());
    taps_kernel.pick()(sums_.get(), taps[0][0]);
    const int64_t results = std::min(UNIT, p_.result_channels - b * UNIT);
    const int64_t channels = std::min(UNIT, p_.image_channels - c * UNIT);
    for (int64_t o = 0; o < results; ++o) {
      const int32_t of_zero = zero * gradient_sums_[(b - first_block_) * UNIT + o];
      for (int64_t t = 0; t < TAPS; ++t) {
        int32_t* to = totals + ((b * UNIT + o) * TAPS + t) * p_.image_channels + c * UNIT;
        for (int64_t i = 0; i < channels; ++i) to[i] = (first ? 0 : to[i]) + taps[o][t][i] - of_zero;
      }
    }
  }
};

}  // namespace

bool suits_gradient(const Product& p, int64_t largest) {
  if (!is_plain(p, p.phases[0])) return false;
  return p.batch * p.result_pixels() * largest * 128 < int64_t{1} << 31;  // totals have 32 bits
}

void sum_gradient(const Product& p, const uint8_t* image, int zero, const int8_t* gradients, int32_t* totals,
                  int threads) {
  const int64_t tiles = Grid(p, p.phases[0]).tiles, size = p.result_channels * TAPS * p.image_channels;
  // Threads share the results; where those are few, the tiles, each with totals of its own.
  const bool share_tiles = p.blocks() < 4 * threads && tiles >= 2 * TILES * threads;
  const int64_t parts = share_tiles ? threads : 1;
  const Buffer<int32_t> others = new_buffer<int32_t>((parts - 1) * size);
  for (int64_t group = 0; group < p.groups; ++group, totals += size) {
    if (parts == 1) {
      parallel_for(p.blocks(), 1, threads, [&](int64_t first, int64_t last) {
        GradientPart(p, image, gradients, group, first, last).run(0, tiles, zero, totals);
      });
      continue;
    }
    parallel_for(parts, 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        GradientPart(p, image, gradients, group, 0, p.blocks())
            .run(tiles * part / parts, tiles * (part + 1) / parts, zero,
                 part == 0 ? totals : others.get() + (part - 1) * size);
    });
    parallel_for(size, 1 << 14, threads, [&](int64_t first, int64_t last) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = first; i < last; ++i) totals[i] += others[(part - 1) * size + i];
    });
  }
}

}  // namespace winograd
}  // namespace bitorch_engine
