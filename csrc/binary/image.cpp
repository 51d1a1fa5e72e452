#include "binary/image.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "bits/bits.h"
#include "runtime/parallel.h"

namespace bitorch_engine {
namespace binary {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // values a thread takes at least

// Pixels that lie at equal distances in x, in the order of the image: `runs` times `length` of them.
struct Runs {
  int64_t length = 1, step = 0;
  int dims = 0;
  int64_t sizes[4], strides[4];  // of what is around a run, the innermost first

  Runs(const int64_t* size, const int64_t* stride, int count) {
    int d = count - 1;
    for (; d >= 0 && (length == 1 || size[d] == 1 || stride[d] == length * step); --d) {
      if (size[d] == 1) continue;
      if (length == 1) step = stride[d];
      length *= size[d];
    }
    for (; d >= 0; --d) {
      if (size[d] == 1) continue;
      sizes[dims] = size[d];
      strides[dims++] = stride[d];
    }
  }

  int64_t offset(int64_t run) const {
    int64_t at = 0;
    for (int d = 0; d < dims; ++d, run /= sizes[d - 1]) at += run % sizes[d] * strides[d];
    return at;
  }
};

// As SignFunction, indices of 2 bits.
bool pack_pairs(const Floats& f, float low, uint32_t* out, int64_t out_stride) {
  constexpr int64_t AT_ONCE = 1 << 14;  // values
  const int64_t words = words_of(2 * f.channels), deep = words * WORD / 2, most = std::max<int64_t>(1, AT_ONCE / deep);
  const std::unique_ptr<uint8_t[]> index(new uint8_t[most * deep]());  // what fills the last word stays 0
  const auto quantize = quantize_activation_kernel.pick();
  const auto pack = pack_kernel.pick();
  const int64_t pixel_bytes = f.pixel_stride * (f.dtype == FLOAT32 ? 4 : 2);
  bool odd = false;
  for (int64_t p = 0; p < f.pixels; p += most) {
    const int64_t some = std::min(most, f.pixels - p);
    odd |= quantize(static_cast<const uint8_t*>(f.x) + p * pixel_bytes, f.dtype, f.pixel_stride, f.channel_stride, some,
                    f.channels, {f.inverse_scale, low, 2, 1}, index.get(), deep, nullptr);
    const int64_t runs = out_stride == words ? 1 : some, length = some / runs * deep;
    for (int64_t run = 0; run < runs; ++run)
      pack(index.get() + run * length, reinterpret_cast<uint8_t*>(out + (p + run) * out_stride), length, 2);
  }
  return odd;
}

}  // namespace

Image::Image(const Geometry& g, const void* x, Dtype dtype, const int64_t* strides, int64_t bits, float low,
             float inverse_scale, int threads) {
  int64_t channels = g.in_channels / g.groups, groups = g.groups;
  const int64_t pixels = g.batch * g.in_pixels(), pitch = groups * words_of(channels);
  const int64_t element = dtype == FLOAT32 ? 4 : 2;
  own_ = new_buffer<uint32_t>(pixels * pitch);
  words_ = own_.get();
  const int64_t sizes[4] = {g.batch, g.in[0], g.in[1], g.in[2]};
  const int64_t steps[4] = {strides[0], strides[2], strides[3], strides[4]};
  const Runs runs(sizes, steps, 4);
  const int64_t channel_stride = g.in_channels == 1 ? 1 : strides[1];
  if (channels % WORD == 0) {
    channels *= groups;
    groups = 1;
  }
  // Where channels lie together and fill their words, pixels are no more than further channels.
  const bool dense = bits == 1 && channel_stride == 1 && groups == 1 && channels % WORD == 0 && runs.step == channels;
  const auto sign = sign_kernel.pick();
  std::atomic<bool> odd{false};
  const int64_t grain = std::max<int64_t>(1, GRAIN / g.in_channels);
  parallel_for(pixels, grain, threads, [&](int64_t first, int64_t last) {
    bool seen = false;
    while (first < last) {
      const int64_t run = first / runs.length, at = first % runs.length;
      const int64_t count = std::min(last - first, runs.length - at);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t start = runs.offset(run) + at * runs.step + group * channels / bits * channel_stride;
        const uint8_t* from = static_cast<const uint8_t*>(x) + start * element;
        Floats floats{from, dtype, runs.step, channel_stride, count, channels / bits, inverse_scale};
        if (dense) {
          floats.pixels = 1;
          floats.channels = count * channels;
        }
        uint32_t* const to = own_.get() + first * pitch + group * words_of(channels);
        seen |= bits == 1 ? sign(floats, to, pitch) : pack_pairs(floats, low, to, pitch);
      }
      first += count;
    }
    if (seen) odd = true;
  });
  odd_ = odd;
}

Image::Image(const Geometry& g, const uint8_t* codes, int threads) {
  const int64_t channels = g.in_channels / g.groups, words = words_of(channels);
  if (channels % WORD == 0 && reinterpret_cast<uintptr_t>(codes) % alignof(uint32_t) == 0) {
    words_ = reinterpret_cast<const uint32_t*>(codes);
    return;
  }
  const int64_t runs = g.batch * g.in_pixels() * g.groups, bytes = (runs * channels + 7) / 8;
  own_ = new_buffer<uint32_t>(runs * words);
  words_ = own_.get();
  parallel_for(runs, std::max<int64_t>(1, GRAIN / channels), threads, [&](int64_t first, int64_t last) {
    uint32_t* to = own_.get() + first * words;
    for (int64_t run = first; run < last; ++run)
      for (int64_t c = 0; c < channels; c += WORD)
        *to++ = bits_at(codes, bytes, run * channels + c, std::min(WORD, channels - c));
  });
}

Entries::Entries(const Geometry& g, const std::vector<Box>& boxes, const uint32_t* words, const lookup::Lookup* lookup,
                 int threads)
    : partners_(lookup && lookup->partners) {
  if (!lookup) return;
  const auto make_entries = lookup->entries_kernel.pick();
  const int64_t channels = g.in_channels / g.groups, runs = g.batch * g.in_pixels() * g.groups;
  const int64_t step = words_of(channels), entries = lookup->entries * lookup::bytes_of(channels);
  const int64_t distances[4] = {g.in_pixels(), g.stride[0] * g.in[1] * g.in[2], g.stride[1] * g.in[2], g.stride[2]};
  for (const Box& box : boxes) {
    Buffer<uint16_t>& to = entries_[partners_ ? box.along : 0];
    if (to) continue;
    to = new_buffer<uint16_t>(runs * entries);
    const int64_t distance = distances[box.along] * g.groups;
    parallel_for(runs, std::max<int64_t>(1, GRAIN / channels), threads, [&](int64_t first, int64_t last) {
      // The last pixels have no partner inside the image: what is found for one is not used.
      const int64_t middle = std::clamp(runs - distance, first, last);
      const uint32_t *const from = words + first * step, *const rest = words + middle * step;
      make_entries(from, from + distance * step, middle - first, channels, to.get() + first * entries);
      make_entries(rest, rest, last - middle, channels, to.get() + middle * entries);
    });
  }
}

}  // namespace binary
}  // namespace bitorch_engine
