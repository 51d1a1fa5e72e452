// The weight's gradient of convolutions with few channels a group. For each lane, tap and image channel of the group
//
//   total = sum over pixels p of all samples of row[lane, p] * column[channel, p at the tap]
//
// rows are the gradient and columns the activation; of a transposed convolution, the other way round.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "depthwise/bands.h"
#include "depthwise/depthwise.h"
#include "depthwise/slab.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<DepthwiseGradientFunction> depthwise_gradient_kernel{
    "depthwise.grad_weight",
    {depthwise_gradient_scalar, nullptr, BE_X86(depthwise_gradient_avx2), BE_X86(depthwise_gradient_avx512)}};

namespace {

constexpr int64_t MOST = 1 << 14;   // pixels: twice as many products of 255 * 255 fit 32 bits
constexpr int64_t GRAIN = 1 << 16;  // products a thread takes at least

// One thread's sums: (block of lanes, 1 + products, LANE_BLOCK); the first are those of the rows alone.
class Totals {
 public:
  explicit Totals(int64_t count) : near_(count), exact_(count) {}

  // The sums that the next `pixels` pixels are added to.
  int32_t* of_next(int64_t pixels) {
    pixels_ += pixels;
    if (pixels_ > 2 * MOST) {
      exact();
      pixels_ = pixels;
    }
    return near_.data();
  }

  const std::vector<int64_t>& exact() {
    for (size_t i = 0; i < near_.size(); ++i) exact_[i] += near_[i];
    std::fill(near_.begin(), near_.end(), 0);
    pixels_ = 0;
    return exact_;
  }

 private:
  std::vector<int32_t> near_;
  std::vector<int64_t> exact_;
  int64_t pixels_ = 0;
};

void copy(const uint8_t* from, int64_t count, uint8_t flip, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] ^ flip;
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// Arguments as be_grad_weight.
BE_EXPORT void be_depthwise_grad_weight(const Geometry* geometry, int rows_are_gradient, const uint8_t* rows,
                                        const void* columns, float low, int bits, const float* scale, float* out,
                                        int threads) {
  const Product p(*geometry, false, true);
  const Source source{rows_are_gradient ? SourceKind::CODES : SourceKind::GRADIENT, columns, FLOAT32, 0, 0, {}, bits,
                      1.0f, low};
  const Bands bands(p, threads);
  const int d = bands.dimension;
  const int64_t lanes = Slab::lanes(p), blocks = lanes / LANE_BLOCK, channels = p.groups * p.result_channels;
  const int64_t products = p.taps * p.image_channels, block_sums = (1 + products) * LANE_BLOCK;
  const uint8_t flip = rows_are_gradient ? 0x80 : 0;
  const int row_zero = rows_are_gradient ? 128 : bits == 1 ? 1 : static_cast<int>(-low);
  const std::vector<int64_t> offsets = product_offsets(p, p.phases[0]);
  const auto multiply = depthwise_gradient_kernel.pick();
  std::vector<Totals> totals(threads, Totals(blocks * block_sums));
  std::atomic<int> next{0};

  const int64_t band_products = bands.steps * p.result_pixels() / std::max<int64_t>(1, bands.all) * lanes * products;
  parallel_for(p.batch * bands.count(), 1 + GRAIN / (band_products + 1), threads, [&](int64_t begin, int64_t end) {
    Totals& mine = totals[next++];
    Slab slab(p, source, bands.rows(bands.steps));
    const int64_t width = p.result[2], longest = std::min(width, MOST);
    const Buffer<uint8_t> line = new_buffer<uint8_t>(longest * lanes + MARGIN);
    std::memset(line.get(), 0, longest * lanes + MARGIN);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / bands.count(), first = unit % bands.count() * bands.steps;
      const int64_t last = std::min(bands.all, first + bands.steps);
      slab.fill(sample, bands.row(first), bands.rows(last - first));
      for (int64_t z = d == 0 ? first : 0; z < (d == 0 ? last : p.result[0]); ++z)
        for (int64_t y = d == 1 ? first : 0; y < (d == 1 ? last : p.result[1]); ++y)
          for (int64_t x = 0; x < width; x += longest) {
            const int64_t some = std::min(longest, width - x);
            const uint8_t* from = rows + (((sample * p.result[0] + z) * p.result[1] + y) * width + x) * channels;
            for (int64_t i = 0; i < some; ++i) copy(from + i * channels, channels, flip, line.get() + i * lanes);
            int32_t* sums = mine.of_next(some);
            const uint8_t* base = slab.bytes() + bands.base(z, y, first) + x * p.base_step[2] * Slab::pixel_bytes(p);
            for (int64_t b = 0; b < blocks; ++b)
              multiply({base + b * LANE_BLOCK, offsets.data(), products, p.base_step[2] * Slab::pixel_bytes(p), some,
                        line.get() + b * LANE_BLOCK, lanes, row_zero, sums + b * block_sums});
          }
    }
  });

  std::vector<int64_t> all(blocks * block_sums);
  for (Totals& part : totals) {
    const std::vector<int64_t>& exact = part.exact();
    for (size_t i = 0; i < all.size(); ++i) all[i] += exact[i];
  }
  for (int64_t lane = 0; lane < channels; ++lane) {
    const int64_t* sums = all.data() + lane / LANE_BLOCK * block_sums + lane % LANE_BLOCK;
    for (int64_t c = 0; c < p.image_channels; ++c)
      for (int64_t t = 0; t < p.taps; ++t) {
        const int64_t total = sums[(1 + t * p.image_channels + c) * LANE_BLOCK] - source.zero() * sums[0];
        const int64_t gradient = rows_are_gradient ? lane : lane / p.result_channels * p.image_channels + c;
        out[(lane * p.image_channels + c) * p.taps + t] = static_cast<float>(total) * scale[gradient];
      }
  }
}
