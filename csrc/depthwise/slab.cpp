#include "depthwise/slab.h"

#include <algorithm>
#include <cstring>

#include "bits/bits.h"
#include "depthwise/depthwise.h"
#include "runtime/round_up.h"
#include "square/square.h"

namespace bitorch_engine {

int64_t Slab::lanes(const Product& p) {
  return round_up(p.groups * p.result_channels, LANE_BLOCK);
}

int64_t Slab::pixel_bytes(const Product& p) { return p.image_channels * lanes(p); }

int64_t Slab::row_pixels(const Product& p) { return (dimension(p) == 0 ? p.padded[1] : 1) * line_pixels(p); }

Slab::Slab(const Product& product, const Source& source, int64_t most, bool square)
    : p_(product),
      source_(source),
      square_(square),
      direct_(product.image_channels == 1 && product.result_channels == 1),
      floats_(square && direct_ && source.kind == SourceKind::FLOATS && source.dtype == FLOAT32 &&
              source.channel == 1 && source.bits > 1) {
  const int64_t size = most * row_pixels(p_) * pixel_bytes(p_);
  bytes_ = new_buffer<uint8_t>(size + MARGIN);
  // Where lanes fill up a block, nothing writes them; all else is written before it is read.
  const int64_t written = lanes(p_) == p_.groups * p_.result_channels ? size : 0;
  std::memset(bytes_.get() + written, 0, size - written + MARGIN);
  if (floats_) return;
  const int64_t line = p_.image[2] * p_.groups * p_.image_channels;
  line_ = new_buffer<uint8_t>(line + 16);
  if (source.kind == SourceKind::FLOATS && source.channel != 1 && source.step[2] == 1 &&
      source.step[1] == p_.image[2] && dimension(p_) == 1)
    planes_ = new_buffer<uint8_t>(most * line);
  if (!square_) return;
  pixels_ = new_buffer<uint8_t>(line_pixels(p_) * pixel_bytes(p_));
  std::memset(pixels_.get(), 0, line_pixels(p_) * pixel_bytes(p_));
}

void Slab::fill(int64_t sample, int64_t first, int64_t count) {
  const int64_t row_bytes = row_pixels(p_) * pixel_bytes(p_);
  int64_t kept = 0;
  if (sample == sample_ && first >= first_ && first < first_ + count_) {
    kept = std::min(count, first_ + count_ - first);
    std::memmove(bytes_.get(), bytes_.get() + (first - first_) * row_bytes, kept * row_bytes);
  }
  if (planes_) fill_planes(sample, first + kept - p_.before[1], first + count - p_.before[1]);
  const int64_t lines = dimension(p_) == 0 ? p_.padded[1] : 1, line_bytes = row_bytes / lines;
  for (int64_t row = first + kept; row < first + count; ++row)
    for (int64_t y = 0; y < lines; ++y) {
      const bool deep = dimension(p_) == 0;
      fill_line(sample, (deep ? row : 0) - p_.before[0], (deep ? y : row) - p_.before[1],
                bytes_.get() + (row - first) * row_bytes + y * line_bytes);
    }
  sample_ = sample;
  first_ = first;
  count_ = count;
}

void Slab::fill_line(int64_t sample, int64_t z, int64_t y, uint8_t* to) {
  const int64_t pixels = line_pixels(p_);
  if (z < 0 || z >= p_.image[0] || y < 0 || y >= p_.image[1]) {
    std::memset(to, source_.zero(), pixels * pixel_bytes(p_));
  } else if (floats_) {
    const float* x = static_cast<const float*>(source_.x) + sample * source_.sample + y * source_.step[1];
    const FloatLine line{x, p_.image[2], source_.step[2], p_.groups, p_.before[2], pixels};
    odd_ |= quantize_pairs_kernel.pick()(line, source_.rule(), to);
  } else if (square_) {
    fill_pixels(sample, z, y, pixels_.get());
    pair_pixels_kernel.pick()(pixels_.get(), pixels, lanes(p_), to);
  } else {
    fill_pixels(sample, z, y, to);
  }
}

// Lines first .. last - 1 of the image, those that there are: one by one, they would be too short for vectors.
void Slab::fill_planes(int64_t sample, int64_t first, int64_t last) {
  const int64_t channels = p_.groups * p_.image_channels, width = p_.image[2];
  first_plane_ = std::max<int64_t>(0, first);
  const int64_t lines = std::min(last, p_.image[1]) - first_plane_;
  if (lines <= 0) return;
  const uint8_t* from = static_cast<const uint8_t*>(source_.x) +
                        (sample * source_.sample + first_plane_ * width) * (source_.dtype == FLOAT32 ? 4 : 2);
  odd_ |= quantize_activation_kernel.pick()(from, source_.dtype, 1, source_.channel, lines * width, channels,
                                            source_.rule(), planes_.get(), channels, nullptr);
}

void Slab::fill_pixels(int64_t sample, int64_t z, int64_t y, uint8_t* to) {
  const int64_t width = p_.image[2], channels = p_.groups * p_.image_channels, pitch = pixel_bytes(p_);
  const int64_t head = p_.before[2] * pitch;
  std::memset(to, source_.zero(), head);
  to += head;
  // Where lanes are the channels and none fills up, lines of pixels have no gaps.
  const int64_t stride = direct_ ? pitch : channels;
  uint8_t* plane = planes_ ? planes_.get() + (y - first_plane_) * width * channels : nullptr;
  uint8_t* line = direct_ ? to : plane ? plane : line_.get();
  const int64_t start = ((sample * p_.image[0] + z) * p_.image[1] + y) * width;  // in pixels of a dense tensor
  if (plane) {
    for (int64_t x = 0; direct_ && x < width; ++x) std::memcpy(line + x * stride, plane + x * channels, channels);
  } else if (source_.kind == SourceKind::FLOATS) {
    const int64_t offset = sample * source_.sample + z * source_.step[0] + y * source_.step[1];
    const uint8_t* from = static_cast<const uint8_t*>(source_.x) + offset * (source_.dtype == FLOAT32 ? 4 : 2);
    odd_ |= quantize_activation_kernel.pick()(from, source_.dtype, source_.step[2], source_.channel, width, channels,
                                              source_.rule(), line, stride, nullptr);
  } else {
    const bool gradient = source_.kind == SourceKind::GRADIENT;
    const uint8_t* stream = static_cast<const uint8_t*>(source_.x);
    uint8_t* dense = stride == channels ? line : line_.get();
    if (!gradient) {
      unpack_range(stream, start * channels, width * channels, source_.bits, dense);
      if (source_.bits == 1)
        for (int64_t i = 0; i < width * channels; ++i) dense[i] = static_cast<uint8_t>(dense[i] * 2);
    } else {
      for (int64_t i = 0; i < width * channels; ++i) dense[i] = stream[start * channels + i] ^ 0x80;
    }
    if (dense != line)
      for (int64_t x = 0; x < width; ++x) std::memcpy(line + x * stride, dense + x * channels, channels);
  }
  if (!direct_)
    for (int64_t x = 0; x < width; ++x) spread(line + x * channels, to + x * pitch);
  std::memset(to + width * pitch, source_.zero(), (p_.padded[2] - p_.before[2] - width) * pitch);
}

// One pixel: what each lane reads of every image channel of its group.
void Slab::spread(const uint8_t* from, uint8_t* to) const {
  const int64_t deep = p_.image_channels, wide = p_.result_channels, pitch = lanes(p_);
  for (int64_t c = 0; c < deep; ++c, to += pitch)
    for (int64_t g = 0; g < p_.groups; ++g)
      for (int64_t o = 0; o < wide; ++o) to[g * wide + o] = from[g * deep + c];
}

}  // namespace bitorch_engine
