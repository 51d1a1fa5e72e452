// Convolutions with few channels a group: forward, gradient of the input, and both of transposed ones, which are one
// product (qconv/product.h). Bands of lines are quantized into a slab that stays in the cache, and multiplied there.
#include "depthwise/depthwise.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "bits/bits.h"
#include "depthwise/bands.h"
#include "depthwise/slab.h"
#include "qconv/qconv.h"
#include "runtime/buffer.h"
#include "runtime/convert.h"
#include "runtime/parallel.h"
#include "square/square.h"

namespace bitorch_engine {

const Kernel<DepthwiseFunction> depthwise_kernel{
    "depthwise.multiply", {depthwise_scalar, nullptr, BE_X86(depthwise_avx2), BE_X86(depthwise_avx512)}};

namespace {

constexpr int64_t GRAIN = 1 << 16;  // products a thread takes at least

int64_t products(const Product& p, const Phase& phase) {
  return static_cast<int64_t>(phase.taps.size()) * p.image_channels;
}

int64_t pairs(const Product& p, const Phase& phase) { return (products(p, phase) + 1) / 2; }

// Whether there are three rows of three taps side by side, the first ones in the first pixel of their lines. (Lines of
// an image with depth are not in pairs.)
bool is_square(const Product& p) {
  const std::vector<Tap>& taps = p.phases[0].taps;
  bool yes = p.phases.size() == 1 && p.image_channels == 1 && taps.size() == 9 && p.base_step[2] <= 2 &&
             Slab::dimension(p) == 1;
  for (int64_t k = 0; yes && k < 9; ++k)
    yes = taps[k].shift[1] == taps[k / 3 * 3].shift[1] && taps[k].shift[2] == k % 3 - p.before[2];
  return yes;
}

// Bytes of the arranged weights of the phases before this one.
int64_t weights_before(const Product& p, size_t phase) {
  int64_t bytes = 0;
  for (size_t f = 0; f < phase; ++f) bytes += pairs(p, p.phases[f]) * 2 * Slab::lanes(p);
  return bytes;
}

// Those of all phases come first, then those of a square.
int64_t weight_bytes(const Product& p) {
  return weights_before(p, p.phases.size()) + (is_square(p) ? Slab::lanes(p) / LANE_BLOCK * SQUARE_BYTES : 0);
}

// A line of floats, [pixel][lane], to the result's type and order.
void write_line(const float* line, int64_t pixels, int64_t pitch, int64_t channels, Dtype dtype, uint8_t* out,
                int64_t step, int64_t channel_stride) {
  const auto write = [&](auto convert, auto* to) {
    for (int64_t first = 0; first < channels; first += 16) {  // a cache line of them
      const int64_t count = std::min<int64_t>(16, channels - first);
      for (int64_t x = 0; x < pixels; ++x) {
        const float* from = line + x * pitch + first;
        auto* at = to + x * step + first * channel_stride;
        for (int64_t c = 0; c < count; ++c) at[c * channel_stride] = convert(from[c]);
      }
    }
  };
  if (dtype == FLOAT32) write([](float value) { return value; }, reinterpret_cast<float*>(out));
  else if (dtype == BFLOAT16) write(to_bfloat16, reinterpret_cast<uint16_t*>(out));
  else write(to_float16, reinterpret_cast<uint16_t*>(out));
}

struct Call {
  const QconvArguments& a;
  const Product& product;
  const Source& source;
  const Bands& bands;
  const uint8_t* weights;
  const int32_t* start;  // (phases, lanes)
  const float *factor, *bias, *sample_factor;
  uint8_t* out;
  bool square;  // and sums fit 16 bits

  bool direct() const { return a.out_dtype == FLOAT32 && a.out_channel == 1; }  // results are as kernels write them
};

// Where the results of a line, (z, y), of a phase begin.
uint8_t* line_of_results(const Call& call, const Phase& phase, int64_t sample, int64_t z, int64_t y) {
  const QconvArguments& a = call.a;
  const int64_t* step = call.product.result_step;
  const int64_t place = sample * a.out_sample + (phase.first[0] + z * step[0]) * a.out_step[0] +
                        (phase.first[1] + y * step[1]) * a.out_step[1] + phase.first[2] * a.out_step[2];
  return call.out + place * (a.out_dtype == FLOAT32 ? 4 : 2);
}

// What all lines of a phase share.
struct PhaseWork {
  std::vector<int64_t> offsets;
  DepthwiseLines line;

  PhaseWork(const Call& call, size_t f) : offsets(product_offsets(call.product, call.product.phases[f])), line{} {
    const Product& p = call.product;
    const Phase& phase = p.phases[f];
    if (offsets.size() % 2) offsets.push_back(offsets.back());
    line.offsets = offsets.data();
    line.pairs = pairs(p, phase);
    line.step = p.base_step[2] * Slab::pixel_bytes(p);
    line.pixels = phase.count[2];
    line.line_step = p.base_step[1] * Slab::line_pixels(p) * Slab::pixel_bytes(p);
    line.line_pitch = p.result_step[1] * call.a.out_step[1];
    line.channels = p.groups * p.result_channels;
    line.weights = reinterpret_cast<const int8_t*>(call.weights) + weights_before(p, f);
    line.start = call.start + static_cast<int64_t>(f) * Slab::lanes(p);
    line.bias = call.bias;
    line.fit = pairs_that_fit(call.source.largest(), 1 << (call.a.w_bits - 1));
  }
};

// The result pixels of a band, first .. last - 1 of each phase, of one sample that is in the slab.
void multiply_band(const Call& call, const Slab& slab, int64_t sample, int64_t first, int64_t last, float* scratch,
                   const float* factor, const PhaseWork* works) {
  const Product& p = call.product;
  const QconvArguments& a = call.a;
  const int d = call.bands.dimension;
  const auto multiply = depthwise_kernel.pick();
  const bool direct = call.direct();
  const int64_t step = p.result_step[2] * a.out_step[2];
  for (size_t f = 0; f < p.phases.size(); ++f) {
    const Phase& phase = p.phases[f];
    DepthwiseLines line = works[f].line;
    if (line.pixels <= 0) continue;
    line.factor = factor;
    const int64_t end[2] = {d == 0 ? std::min(last, phase.count[0]) : phase.count[0],
                            d == 1 ? std::min(last, phase.count[1]) : phase.count[1]};
    for (int64_t z = d == 0 ? first : 0; z < end[0]; ++z)
      for (int64_t y = d == 1 ? first : 0; y < end[1]; y += line.lines) {
        line.lines = direct ? end[1] - y : 1;
        line.base = slab.bytes() + call.bands.base(z, y, first);
        uint8_t* out = line_of_results(call, phase, sample, z, y);
        line.out = direct ? reinterpret_cast<float*>(out) : scratch;
        line.pitch = direct ? step : Slab::lanes(p);
        multiply(line);
        if (!direct)
          write_line(scratch, line.pixels, line.pitch, line.channels, static_cast<Dtype>(a.out_dtype), out, step,
                     a.out_channel);
      }
  }
}

// The same of a square. factor: of the sample.
void multiply_band_of_square(const Call& call, const Slab& slab, int64_t sample, int64_t first, int64_t last,
                             float* scratch, const float* factor) {
  const Product& p = call.product;
  const QconvArguments& a = call.a;
  const Phase& phase = p.phases[0];
  const auto multiply = square_kernel.pick();
  const bool direct = call.direct();
  const int64_t step = p.result_step[2] * a.out_step[2], line_bytes = Slab::line_pixels(p) * Slab::pixel_bytes(p);
  SquareLine line{};
  line.block_step = LANE_BLOCK * Slab::line_pixels(p);
  line.strided = p.base_step[2] == 2;
  line.pixels = phase.count[2];
  line.channels = p.groups * p.result_channels;
  line.weights = reinterpret_cast<const int8_t*>(call.weights) + weights_before(p, 1);
  line.start = call.start;
  line.factor = factor;
  line.bias = call.bias;
  line.pitch = direct ? step : Slab::lanes(p);
  for (int64_t y = first; y < last; ++y) {
    for (int64_t i = 0; i < 3; ++i)
      line.rows[i] = slab.bytes() + (call.bands.row(y - first) + p.before[1] + phase.taps[3 * i].shift[1]) * line_bytes;
    uint8_t* out = line_of_results(call, phase, sample, 0, y);
    line.out = direct ? reinterpret_cast<float*>(out) : scratch;
    multiply(line);
    if (!direct)
      write_line(scratch, line.pixels, line.pitch, line.channels, static_cast<Dtype>(a.out_dtype), out, step,
                 a.out_channel);
  }
}

// Returns whether a value of x was not finite.
bool multiply_all(const Call& call) {
  const Product& p = call.product;
  const Bands& bands = call.bands;
  const int64_t lanes = Slab::lanes(p), count = bands.count();
  const int64_t band_products = bands.steps * p.result_pixels() / std::max<int64_t>(1, bands.all) * lanes *
                                p.image_channels * p.taps / static_cast<int64_t>(p.phases.size());
  std::atomic<bool> odd{false};
  parallel_for(p.batch * count, 1 + GRAIN / (band_products + 1), static_cast<int>(call.a.threads),
               [&](int64_t begin, int64_t end) {
    Slab slab(p, call.source, bands.rows(bands.steps), call.square);
    Buffer<float> scratch, factor;
    if (!call.direct()) scratch = new_buffer<float>(p.result[2] * lanes);
    if (call.sample_factor) factor = new_buffer<float>(lanes);
    std::vector<PhaseWork> works;
    works.reserve(p.phases.size());
    for (size_t f = 0; !call.square && f < p.phases.size(); ++f) works.emplace_back(call, f);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / count, first = unit % count * bands.steps;
      const int64_t last = std::min(bands.all, first + bands.steps);
      slab.fill(sample, bands.row(first), bands.rows(last - first));
      if (call.sample_factor) std::fill_n(factor.get(), lanes, call.sample_factor[sample]);
      const float* of_sample = call.sample_factor ? factor.get() : call.factor;
      if (call.square) multiply_band_of_square(call, slab, sample, first, last, scratch.get(), of_sample);
      else multiply_band(call, slab, sample, first, last, scratch.get(), of_sample, works.data());
    }
    if (slab.odd()) odd = true;
  });
  return odd;
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT int64_t be_depthwise_arranged_bytes(const Geometry* geometry, int scatter, int rows_are_results) {
  return weight_bytes(Product(*geometry, scatter, rows_are_results));
}

BE_EXPORT int64_t be_depthwise_phases(const Geometry* geometry, int scatter, int rows_are_results) {
  return static_cast<int64_t>(Product(*geometry, scatter, rows_are_results).phases.size());
}

// Result channels, padded.
BE_EXPORT int64_t be_depthwise_lanes(const Geometry* geometry, int scatter, int rows_are_results) {
  return Slab::lanes(Product(*geometry, scatter, rows_are_results));
}

// out: be_depthwise_arranged_bytes of them.  sums: (phases, lanes) int32, the sum of the codes that each lane has.
BE_EXPORT void be_depthwise_arrange(const Geometry* geometry, int scatter, int rows_are_results, const uint8_t* packed,
                                    int bits, uint8_t* out, int32_t* sums) {
  const Product p(*geometry, scatter, rows_are_results);
  const int64_t lanes = Slab::lanes(p), deep = p.image_channels, wide = p.result_channels;
  const int64_t count = p.groups * deep * wide * p.taps;
  const Buffer<uint8_t> index = new_buffer<uint8_t>(count);
  unpack_range(packed, 0, count, bits, index.get());
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  const bool square = is_square(p);
  int8_t* const of_square = reinterpret_cast<int8_t*>(out) + weights_before(p, p.phases.size());
  std::fill_n(out, weight_bytes(p), uint8_t{0});  // none where no tap reaches a result
  std::memset(sums, 0, p.phases.size() * lanes * sizeof *sums);
  for (size_t f = 0; f < p.phases.size(); ++f, sums += lanes) {
    const Phase& phase = p.phases[f];
    uint8_t* of_phase = out + weights_before(p, f);
    const int64_t number = pairs(p, phase);
    for (int64_t k = 0; k < products(p, phase); ++k)
      for (int64_t lane = 0; lane < p.groups * wide; ++lane) {
        const int64_t group = lane / wide, o = lane % wide, c = k % deep, tap = phase.taps[k / deep].weight;
        const int64_t row = rows_are_results ? lane * deep + c : (group * deep + c) * wide + o;
        const int code = index[row * p.taps + tap] * step + low;
        of_phase[(lane / LANE_BLOCK * number + k / 2) * 64 + place_of_lane(lane % LANE_BLOCK) + k % 2] =
            static_cast<uint8_t>(code);
        sums[lane] += code;
        if (!square) continue;
        int8_t* line =
            of_square + lane / LANE_BLOCK * SQUARE_BYTES + k / 3 * SQUARE_ROW + place_in_pair(lane % LANE_BLOCK);
        for (int64_t place : PLACES_OF_TAP[k % 3]) line[place] = static_cast<int8_t>(code);
      }
  }
}

// As be_qconv, of weights and sums of be_depthwise_arrange. Returns 1 where a value of x was not finite, else 0.
BE_EXPORT int be_depthwise(const QconvArguments* a, const void* x, const float* scale, const float* low,
                           const uint8_t* weights, const int32_t* sums, const float* factor, const float* sample_factor,
                           const float* bias, const float* poison, void* out) {
  const Product p(a->geometry, a->scatter, a->rows_are_results);
  const Source source{static_cast<SourceKind>(a->source), x, static_cast<Dtype>(a->x_dtype), a->x_sample, a->x_channel,
                      {a->x_step[0], a->x_step[1], a->x_step[2]}, static_cast<int>(a->x_bits), scale ? *scale : 1.0f,
                      low ? *low : 0.0f};
  const int64_t lanes = Slab::lanes(p), channels = p.groups * p.result_channels;
  const int64_t all = static_cast<int64_t>(p.phases.size()) * lanes;
  const Buffer<int32_t> start = new_buffer<int32_t>(all);
  const int zero = source.zero();
  for (int64_t i = 0; i < all; ++i) start[i] = -sums[i] * zero;
  const Buffer<float> floats = new_buffer<float>(2 * lanes);
  float *factors = floats.get(), *biases = factors + lanes;
  std::fill_n(factors, 2 * lanes, 0.0f);
  for (int64_t i = 0; factor && i < channels; ++i) factors[i] = factor[i] * source.scale;
  if (bias) std::copy_n(bias, channels, biases);
  const bool square = is_square(p) && pairs_that_fit(source.largest(), 1 << (a->w_bits - 1)) >= 5;
  const Bands bands(p, static_cast<int>(a->threads));
  const Call call{*a, p, source, bands, weights, start.get(), factors, bias ? biases : nullptr, sample_factor,
                  static_cast<uint8_t*>(out), square};
  return multiply_all(call) || (poison && std::isnan(*poison));
}

BE_EXPORT int be_depthwise_planned(const Planned* p, const void* x, void* out) {
  if (p->watch.changed()) return CHANGED;
  return be_depthwise(static_cast<const QconvArguments*>(p->arguments), x, p->scale, p->low,
                      static_cast<const uint8_t*>(p->weights), p->sums, p->factor, nullptr, p->bias, nullptr, out);
}
