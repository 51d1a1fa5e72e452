// Whole convolutions against their definition, which even an only, scalar row has to meet.
#include <algorithm>

#include "agreement.h"
#include "bits/bits.h"
#include "qconv/image.h"
#include "qconv/qconv.h"

extern "C" {
using bitorch_engine::Geometry;
using bitorch_engine::QconvArguments;
int64_t be_qconv_arranged_values(const Geometry* geometry, int scatter, int rows_are_results);
void be_qconv_arrange(const Geometry* geometry, int scatter, int rows_are_results, const uint8_t* packed, int bits,
                      int out_bits, uint8_t* out, int32_t* sums, int threads);
int be_qconv(const QconvArguments* a, const void* x, const float* scale, const float* low, const uint8_t* weights,
             const int32_t* sums, const float* factor, const float* sample_factor, const float* bias,
             const float* poison, void* out);
}

namespace bitorch_engine {
namespace {

struct Problem {
  Geometry g;
  bool scatter, rows_are_results;
  int a_bits, w_bits;

  int64_t image_channels() const { return scatter ? g.out_channels : g.in_channels; }
  int64_t result_channels() const { return scatter ? g.in_channels : g.out_channels; }
  const int64_t* image() const { return scatter ? g.out : g.in; }
  const int64_t* result() const { return scatter ? g.in : g.out; }
  int64_t image_pixels() const { return scatter ? g.out_pixels() : g.in_pixels(); }
  int64_t result_pixels() const { return scatter ? g.in_pixels() : g.out_pixels(); }
};

Problem draw(Random& random) {
  Problem p{{}, random.flip(), random.flip(), static_cast<int>(random.between(1, 8)),
            static_cast<int>(random.between(1, 8))};
  Geometry& g = p.g;
  g.batch = random.between(1, 3);
  g.groups = random.between(1, 3);
  g.in_channels = g.groups * random.between(4, 40);
  g.out_channels = g.groups * random.between(4, 40);
  for (int d = 0; d < 3; ++d) {
    g.kernel[d] = random.between(1, 3);
    g.stride[d] = random.between(1, 3);
    g.dilation[d] = random.between(1, 2);
    g.pad[d] = random.between(0, 2);
    const int64_t reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
    g.in[d] = std::max<int64_t>(1, reach - 2 * g.pad[d]) + random.between(0, d == 2 ? 12 : 2);
    g.out[d] = (g.in[d] + 2 * g.pad[d] - reach) / g.stride[d] + 1;
  }
  return p;
}

// Calls visit(large, small, tap) for what meets in one dimension: large + pad = small * stride + tap * dilation.
template <class Visit>
void for_meeting(const Geometry& g, int d, const Visit& visit) {
  for (int64_t small = 0; small < g.out[d]; ++small)
    for (int64_t tap = 0; tap < g.kernel[d]; ++tap) {
      const int64_t large = small * g.stride[d] + tap * g.dilation[d] - g.pad[d];
      if (large >= 0 && large < g.in[d]) visit(large, small, tap);
    }
}

// x: (batch, image channels, pixels) codes; weight: (rows, columns / groups, taps) codes. Results as x.
std::vector<float> definition(const Problem& p, const std::vector<float>& x, const std::vector<int>& weight) {
  const Geometry& g = p.g;
  const int64_t images = p.image_channels() / g.groups, results = p.result_channels() / g.groups, taps = g.taps();
  std::vector<float> out(g.batch * p.result_channels() * p.result_pixels());
  const auto place = [](const int64_t* size, int64_t z, int64_t y, int64_t x) {
    return (z * size[1] + y) * size[2] + x;
  };
  for_meeting(g, 0, [&](int64_t lz, int64_t sz, int64_t tz) {
    for_meeting(g, 1, [&](int64_t ly, int64_t sy, int64_t ty) {
      for_meeting(g, 2, [&](int64_t lx, int64_t sx, int64_t tx) {
        const int64_t large = place(g.in, lz, ly, lx), small = place(g.out, sz, sy, sx);
        const int64_t tap = place(g.kernel, tz, ty, tx);
        const int64_t from = p.scatter ? small : large, to = p.scatter ? large : small;
        for (int64_t n = 0; n < g.batch; ++n)
          for (int64_t r = 0; r < p.result_channels(); ++r)
            for (int64_t i = 0; i < images; ++i) {
              const int64_t group = r / results, image = group * images + i;
              const int64_t row = p.rows_are_results ? r : image, column = p.rows_are_results ? i : r % results;
              const int code = weight[(row * (p.rows_are_results ? images : results) + column) * taps + tap];
              out[(n * p.result_channels() + r) * p.result_pixels() + to] +=
                  x[(n * p.image_channels() + image) * p.image_pixels() + from] * static_cast<float>(code);
            }
      });
    });
  });
  return out;
}

bool meets_definition(uint64_t seed) {
  Random random(seed);
  const Problem p = draw(random);
  const Geometry& g = p.g;
  const float low = p.a_bits == 1 ? -1.0f : random.flip() ? 0.0f : static_cast<float>(-(1 << (p.a_bits - 1)));
  std::vector<float> x(g.batch * p.image_channels() * p.image_pixels());
  const int64_t top = (1 << p.a_bits) - 1;
  for (float& one : x) one = static_cast<float>(random.between(0, top) * (p.a_bits == 1 ? 2 : 1)) + low;
  const int64_t rows = p.rows_are_results ? p.result_channels() : p.image_channels();
  const int64_t columns = (p.rows_are_results ? p.image_channels() : p.result_channels()) / g.groups * g.taps();
  const std::vector<uint8_t> index = random.bytes(rows * columns, (1 << p.w_bits) - 1);
  std::vector<uint8_t> packed((rows * columns * p.w_bits + 7) / 8);
  std::vector<int> weight;
  for (uint8_t one : index) weight.push_back(one * (p.w_bits == 1 ? 2 : 1) + lowest_code(p.w_bits));
  const int threads = static_cast<int>(random.between(1, 2));
  be_pack(index.data(), packed.data(), rows * columns, p.w_bits, threads);

  const int arranged_bits = random.flip() ? 8 : p.w_bits;
  const int64_t blocks = (p.result_channels() / g.groups + 15) / 16 * g.groups;
  std::vector<uint8_t> arranged(be_qconv_arranged_values(&g, p.scatter, p.rows_are_results) * arranged_bits / 8);
  std::vector<int32_t> sums(g.taps() * blocks * 16);
  be_qconv_arrange(&g, p.scatter, p.rows_are_results, packed.data(), p.w_bits, arranged_bits, arranged.data(),
                   sums.data(), threads);
  QconvArguments a{};
  a.geometry = g;
  a.scatter = p.scatter;
  a.rows_are_results = p.rows_are_results;
  a.source = static_cast<int64_t>(SourceKind::FLOATS);
  a.x_channel = p.image_pixels();
  a.x_sample = p.image_channels() * p.image_pixels();
  a.out_channel = p.result_pixels();
  a.out_sample = p.result_channels() * p.result_pixels();
  for (int64_t d = 2, step = 1; d >= 0; step *= p.image()[d--]) a.x_step[d] = step;
  for (int64_t d = 2, step = 1; d >= 0; step *= p.result()[d--]) a.out_step[d] = step;
  a.x_bits = p.a_bits;
  a.w_bits = p.w_bits;
  a.w_arranged_bits = arranged_bits;
  a.threads = threads;
  const float scale = 1;
  const std::vector<float> factor(p.result_channels(), 1.0f);
  std::vector<float> out(g.batch * p.result_channels() * p.result_pixels());
  be_qconv(&a, x.data(), &scale, &low, arranged.data(), sums.data(), factor.data(), nullptr, nullptr, nullptr,
           out.data());
  return out == definition(p, x, weight);
}

}  // namespace

void check_conv(Agreement& agreement) {
  for (int isa = SCALAR; isa <= best_isa(); ++isa) {
    if (be_cap_isa(isa) != 0) continue;
    int wrong = 0;
    const int rounds = 50;
    for (int round = 0; round < rounds; ++round) wrong += !meets_definition(static_cast<uint64_t>(round));
    agreement.report("a whole convolution", isa, wrong, rounds);
  }
}

}  // namespace bitorch_engine
