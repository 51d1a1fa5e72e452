#include "qconv/image.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "bits/bits.h"
#include "runtime/parallel.h"

namespace bitorch_engine {
namespace {

// Copies `pixels` x `channels` dense bytes, each group of channels padded to `depth`. Reads 3 bytes more than there
// are.
void spread(const uint8_t* from, int64_t pixels, const Product& p, uint8_t* to) {
  const int64_t channels = p.groups * p.image_channels;
  if (p.image_depth == p.image_channels) {
    std::memcpy(to, from, pixels * channels);
    return;
  }
  if (p.image_channels < 4) {  // a depth of 4: one word a group, where a call of memcpy would take 4 ns
    const uint8_t bytes[4] = {255, static_cast<uint8_t>(p.image_channels > 1 ? 255 : 0),
                              static_cast<uint8_t>(p.image_channels > 2 ? 255 : 0), 0};
    uint32_t mask, word;
    std::memcpy(&mask, bytes, 4);
    for (int64_t i = 0; i < pixels * p.groups; ++i) {
      std::memcpy(&word, from + i * p.image_channels, 4);
      word &= mask;
      std::memcpy(to + 4 * i, &word, 4);
    }
    return;
  }
  for (int64_t i = 0; i < pixels * p.groups; ++i)
    std::memcpy(to + i * p.image_depth, from + i * p.image_channels, p.image_channels);
}

}  // namespace

Image::Image(const Product& p, SourceKind kind, const void* x, Dtype dtype, int64_t sample_stride,
             int64_t channel_stride, const int64_t* steps, int bits, float scale, float low, int threads) {
  const int64_t pitch = p.pixel_bytes(), channels = p.groups * p.image_channels;
  const int step = kind != SourceKind::GRADIENT && bits == 1 ? 2 : 1;
  zero_ = kind == SourceKind::GRADIENT ? 128 : bits == 1 ? 1 : static_cast<int>(-low);
  largest_ = kind == SourceKind::GRADIENT ? 255 : bits == 1 ? 2 : (1 << bits) - 1;
  // Tiles read whole vectors: a little more than the last pixel.
  const int64_t size = p.batch * p.padded_pixels() * pitch;
  bytes_ = new_buffer<uint8_t>(size + 64);
  std::memset(bytes_.get() + size, 0, 64);
  const bool dense = p.image_depth == p.image_channels;
  std::atomic<bool> odd{false};
  const ActivationRule rule{1.0f / scale, low, bits, step};
  const auto quantize = quantize_activation_kernel.pick();

  // One line of pixels, in x and in the image, at a time; of planes of channels some short lines, which lie together in
  // x, are quantized with the first of them.
  const bool planes = kind == SourceKind::FLOATS && steps[2] == 1 && steps[1] == p.image[2] && channel_stride > 1;
  const int64_t together = planes ? std::max<int64_t>(1, 128 / p.image[2]) : 1;
  const int64_t lines = p.batch * p.padded[0] * p.padded[1], length = p.padded[2] * pitch;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(length, 1));
  parallel_for(lines, grain, threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<uint8_t[]> row(new uint8_t[together * p.image[2] * channels + 16]);
    int64_t row_first = 0, row_last = 0;  // lines of x that are in it, where they are quantized together
    bool seen = false;
    for (int64_t line = first; line < last; ++line) {
      uint8_t* to = bytes_.get() + line * length;
      const int64_t y = line % p.padded[1] - p.before[1], z = line / p.padded[1] % p.padded[0] - p.before[0];
      const int64_t sample = line / p.padded[1] / p.padded[0];
      const bool inside = y >= 0 && y < p.image[1] && z >= 0 && z < p.image[0];
      const int64_t width = inside ? p.image[2] : 0;
      const int64_t head = inside ? p.before[2] * pitch : length;
      if (dense) {
        std::memset(to, zero_, head);
        std::memset(to + head + width * pitch, zero_, length - head - width * pitch);
      } else {
        std::memset(to, 0, length);
        for (int64_t i = 0; i < p.padded[2]; ++i)
          if (!inside || i < p.before[2] || i >= p.before[2] + width)
            for (int64_t g = 0; g < p.groups; ++g)
              std::memset(to + i * pitch + g * p.image_depth, zero_, p.image_channels);
      }
      if (!inside) continue;
      to += head;
      const int64_t dense_line = (sample * p.image[0] + z) * p.image[1] + y;
      const int64_t line_start = dense_line * width;  // in pixels of a dense tensor
      if (kind == SourceKind::FLOATS) {
        const int64_t offset = sample * sample_stride + z * steps[0] + y * steps[1];
        const uint8_t* source = static_cast<const uint8_t*>(x) + offset * (dtype == FLOAT32 ? 4 : 2);
        if (together > 1) {
          if (dense_line < row_first || dense_line >= row_last) {
            row_first = dense_line;
            row_last = dense_line + std::min(together, p.image[1] - y);
            seen |= quantize(source, dtype, 1, channel_stride, (row_last - row_first) * width, channels, rule,
                             row.get(), channels, nullptr);
          }
          spread(row.get() + (dense_line - row_first) * width * channels, width, p, to);
        } else {
          seen |= quantize(source, dtype, steps[2], channel_stride, width, channels, rule, dense ? to : row.get(),
                           channels, nullptr);
          if (!dense) spread(row.get(), width, p, to);
        }
      } else if (kind == SourceKind::GRADIENT) {
        const uint8_t* source = static_cast<const uint8_t*>(x) + line_start * channels;
        uint8_t* bytes = dense ? to : row.get();
        for (int64_t i = 0; i < width * channels; ++i) bytes[i] = source[i] ^ 0x80;
        if (!dense) spread(bytes, width, p, to);
      } else {
        uint8_t* bytes = dense ? to : row.get();
        unpack_range(static_cast<const uint8_t*>(x), line_start * channels, width * channels, bits, bytes);
        if (step == 2)
          for (int64_t i = 0; i < width * channels; ++i) bytes[i] = static_cast<uint8_t>(bytes[i] * 2);
        if (!dense) spread(bytes, width, p, to);
      }
    }
    if (seen) odd = true;
  });
  odd_ = odd;
}

}  // namespace bitorch_engine
