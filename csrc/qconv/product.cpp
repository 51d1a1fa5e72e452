#include "qconv/product.h"

#include <algorithm>
#include <utility>

#include "runtime/round_up.h"

namespace bitorch_engine {
namespace {

// The phases of one dimension: which taps reach result positions first, first + step, ..., and from how far.
struct Line {
  std::vector<std::pair<int64_t, int64_t>> taps;  // (tap, shift)
  int64_t first, count;
};

std::vector<Line> lines(int64_t kernel, int64_t stride, int64_t dilation, int64_t pad, int64_t results, bool scatter) {
  if (!scatter) {
    Line line{{}, 0, results};
    line.taps.reserve(kernel);
    for (int64_t k = 0; k < kernel; ++k) line.taps.push_back({k, k * dilation - pad});
    std::vector<Line> all;
    all.push_back(std::move(line));
    return all;
  }
  // Position y of the input meets position p of the output through tap k where y + pad = p * stride + k * dilation.
  std::vector<Line> all;
  for (int64_t first = 0; first < std::min(stride, results); ++first) {
    Line line{{}, first, (results - first + stride - 1) / stride};
    for (int64_t k = kernel - 1; k >= 0; --k) {  // so that shifts rise, as above
      const int64_t reach = first + pad - k * dilation;
      if (reach % stride == 0) line.taps.push_back({k, reach / stride});
    }
    all.push_back(std::move(line));
  }
  return all;
}

}  // namespace

Product::Product(const Geometry& g, bool scatter, bool rows_are_results)
    : batch(g.batch), groups(g.groups), rows_are_results(rows_are_results), taps(g.taps()) {
  const int64_t in_channels = g.in_channels / groups, out_channels = g.out_channels / groups;
  image_channels = scatter ? out_channels : in_channels;
  result_channels = scatter ? in_channels : out_channels;
  image_depth = round_up(image_channels, 4);
  std::vector<Line> by_dimension[3];
  for (int d = 0; d < 3; ++d) {
    image[d] = scatter ? g.out[d] : g.in[d];
    result[d] = scatter ? g.in[d] : g.out[d];
    base_step[d] = scatter ? 1 : g.stride[d];
    result_step[d] = scatter ? g.stride[d] : 1;
    by_dimension[d] = lines(g.kernel[d], g.stride[d], g.dilation[d], g.pad[d], result[d], scatter);
    int64_t lowest = 0, highest = image[d] - 1;
    for (const Line& line : by_dimension[d])
      for (const auto& tap : line.taps) {
        lowest = std::min(lowest, tap.second);
        highest = std::max(highest, tap.second + (line.count - 1) * base_step[d]);
      }
    before[d] = -lowest;
    padded[d] = before[d] + highest + 1;
  }
  int64_t start = 0, first_tap = 0;
  phases.reserve(by_dimension[0].size() * by_dimension[1].size() * by_dimension[2].size());
  for (const Line& z : by_dimension[0])
    for (const Line& y : by_dimension[1])
      for (const Line& x : by_dimension[2]) {
        const auto count = [](const Line& line) { return static_cast<int64_t>(line.taps.size()); };
        Phase phase{{}, {count(z), count(y), count(x)}, {z.first, y.first, x.first}, {z.count, y.count, x.count}, 0,
                    start, first_tap};
        phase.taps.reserve(count(z) * count(y) * count(x));
        for (const auto& a : z.taps)
          for (const auto& b : y.taps)
            for (const auto& c : x.taps)
              phase.taps.push_back({(a.first * g.kernel[1] + b.first) * g.kernel[2] + c.first,
                                    {a.second, b.second, c.second}});
        phase.depth = round_up(static_cast<int64_t>(phase.taps.size()) * image_depth, DEPTH);
        start += groups * blocks() * BLOCK * phase.depth;
        first_tap += static_cast<int64_t>(phase.taps.size());
        phases.push_back(std::move(phase));
      }
}

int64_t Product::arranged_values() const {
  const Phase& last = phases.back();
  return last.weights + groups * blocks() * BLOCK * last.depth;
}

}  // namespace bitorch_engine
