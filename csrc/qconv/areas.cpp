#include "qconv/areas.h"

namespace bitorch_engine {
namespace {

// Calls visit(tap) for the taps of a region, counted among those of the phase.
template <class Visit>
void for_each_tap(const Phase& phase, const Region& region, const Visit& visit) {
  const Span &z = region.span[0], &y = region.span[1], &x = region.span[2];
  for (int64_t a = z.low; a < z.high; ++a)
    for (int64_t b = y.low; b < y.high; ++b)
      for (int64_t c = x.low; c < x.high; ++c) visit((a * phase.tap_count[1] + b) * phase.tap_count[2] + c);
}

void find_reads(const Product& p, const Phase& phase, Area& area, Read* reads) {
  int64_t& count = area.read_count = 0;
  for_each_tap(phase, area.region, [&](int64_t tap) {
    const int64_t* shift = phase.taps[tap].shift;
    const int64_t image = ((shift[0] * p.padded[1] + shift[1]) * p.padded[2] + shift[2]) * p.pixel_bytes();
    reads[count++] = {image, tap * p.image_depth * BLOCK};
  });
  const auto follows = [&](int64_t t) {
    return reads[t].image == reads[t - 1].image + p.image_depth &&
           reads[t].weights == reads[t - 1].weights + p.image_depth * BLOCK;
  };
  int64_t run = 1;
  while (run < count && follows(run)) ++run;
  bool same = count > 0 && count % run == 0;
  for (int64_t t = run; t < count && same; ++t) same = t % run == 0 || follows(t);
  if (!same) return;
  count /= run;
  area.depth *= run;
  for (int64_t t = 0; t < count; ++t) reads[t] = reads[t * run];
}

// Of the kernels in use. With AVX2, halves of 8-bit weights are made anew for each region.
Tiles tiles(int64_t pairs) {
  if (current_isa() == AVX2) return {4, pairs < 2 ? 3 : 0};
  return {current_isa() == AVX512 ? 6 : 1, 0};
}

}  // namespace

std::vector<Region> regions_in_use(const Product& p, const Phase& phase, int64_t pairs) {
  // The matrix unit's runs are longer than the edges of small maps.
  return current_isa() == AMX ? std::vector{whole(phase)} : regions(p, phase, tiles(pairs));
}

Areas::Areas(const Product& p, const Phase& phase, const std::vector<Region>& all, const int32_t* sums, int zero) {
  const int64_t channels = p.groups * p.blocks() * BLOCK;
  int64_t taps = 0, first = 0;
  for (const Region& region : all) taps += region.taps();
  reads_ = new_buffer<Read>(taps);
  zero_sums_ = new_buffer<int32_t>(static_cast<int64_t>(all.size()) * channels);
  areas_.reserve(all.size());
  Read* reads = reads_.get();
  int32_t* zero_sum = zero_sums_.get();
  for (const Region& region : all) {
    const int64_t last = first + p.batch * region.pixels();
    areas_.push_back({region, first, last, reads, 0, p.image_depth, zero_sum});
    find_reads(p, phase, areas_.back(), reads);
    for (int64_t o = 0; o < channels; o += BLOCK) {
      int32_t total[BLOCK] = {};  // in registers
      if (zero != 0)
        for_each_tap(phase, region, [&](int64_t tap) {
          const int32_t* sum = sums + (phase.first_tap + tap) * channels + o;
          for (int64_t i = 0; i < BLOCK; ++i) total[i] += sum[i];
        });
      for (int64_t i = 0; i < BLOCK; ++i) zero_sum[o + i] = zero * total[i];
    }
    first = last;
    reads += region.taps();
    zero_sum += channels;
  }
}

}  // namespace bitorch_engine
