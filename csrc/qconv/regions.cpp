#include "qconv/regions.h"

#include <algorithm>

#include "runtime/table.h"

namespace bitorch_engine {
namespace {

// In products of one result channel. In a tile each weight is loaded once, which takes about as long as the products of
// one more pixel. A region is prepared for once, in the time of so many products of all channels, and called for with
// each block of them.
int64_t cost(const Product& p, const Region& region, const Tiles& tiles) {
  constexpr int64_t PREPARE = 1 << 14, CALL = 128;
  const int64_t pixels = p.batch * region.pixels(), count = (pixels + tiles.pixels - 1) / tiles.pixels;
  const int64_t multiplied = pixels + count + tiles.preparation;
  return PREPARE / (p.groups * p.result_channels) + CALL + region.taps() * p.image_depth * multiplied;
}

// Where taps of a dimension lie in the padding: the spans of its result positions, else none.
std::vector<Span> spans_of(const Product& p, const Phase& phase, int d) {
  const int64_t taps = phase.tap_count[d], start = phase.taps[0].shift[d], end = phase.taps.back().shift[d];
  if (start >= 0 && end + (phase.count[d] - 1) * p.base_step[d] < p.image[d]) return {};
  const int64_t distance = taps > 1 ? (end - start) / (taps - 1) : 1;
  return spans(p.image[d], taps, start, distance, p.base_step[d], phase.count[d]);
}

}  // namespace

Region whole(const Phase& phase) {
  Region region;
  for (int d = 0; d < 3; ++d) region.span[d] = {0, phase.count[d], 0, phase.tap_count[d]};
  return region;
}

std::vector<Region> regions(const Product& p, const Phase& phase, const Tiles& tiles) {
  std::vector<Region> found{whole(phase)};
  if (phase.taps.empty()) return found;
  const Region all = found[0];
  const std::vector<Span> cut[3] = {spans_of(p, phase, 0), spans_of(p, phase, 1), spans_of(p, phase, 2)};
  // Any of the dimensions may be cut. What is left out has to be worth it.
  int64_t least = cost(p, all, tiles) * 63 / 64;
  constexpr size_t MOST = 64;  // a long kernel may have one for each of its taps
  for (int dimensions = 1; dimensions < 8; ++dimensions) {
    const Span *first[3], *last[3];
    bool there = true;
    size_t count = 1;
    for (int d = 0; d < 3; ++d) {
      const bool cuts = dimensions >> d & 1;
      first[d] = cuts ? cut[d].data() : &all.span[d];
      last[d] = first[d] + (cuts ? cut[d].size() : 1);
      there &= first[d] < last[d];
      count *= cuts ? cut[d].size() : 1;
    }
    if (!there || count > MOST) continue;
    const auto for_each = [&](const auto& visit) {
      for (const Span* z = first[0]; z < last[0]; ++z)
        for (const Span* y = first[1]; y < last[1]; ++y)
          for (const Span* x = first[2]; x < last[2]; ++x) visit(Region{{*z, *y, *x}});
    };
    int64_t sum = 0;
    for_each([&](const Region& region) { sum += cost(p, region, tiles); });
    if (sum >= least) continue;
    least = sum;
    found.clear();
    for_each([&](const Region& region) { found.push_back(region); });
  }
  return found;
}

}  // namespace bitorch_engine

using namespace bitorch_engine;

// For tests: the number of regions of a product that does not scatter. spans: (regions, 3) Spans, or null.
BE_EXPORT int64_t be_qconv_regions(const Geometry* geometry, int64_t tile_pixels, int64_t preparation, Span* spans) {
  const Product p(*geometry, false, true);
  const std::vector<Region> all = regions(p, p.phases[0], {tile_pixels, preparation});
  if (spans)
    for (const Region& region : all) spans = std::copy_n(region.span, 3, spans);
  return static_cast<int64_t>(all.size());
}
