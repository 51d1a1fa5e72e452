// Loops of one width, which every compiler vectorizes. Included once per instruction set.
#include <cstring>

#include "grad_weight/grad_weight.h"

namespace bitorch_engine {
namespace {

void interleave(const uint8_t* image, const int64_t* bases, int64_t quads, int64_t channels, int center, int8_t* out,
                int64_t block_bytes, int32_t* sums) {
  alignas(64) uint32_t words[LANES];
  alignas(64) int32_t total[LANES] = {};
  const int64_t blocks = (channels + 15) / 16;
  const uint32_t tops = 0x80808080u, centers = static_cast<uint32_t>(center) * 0x01010101u;
  alignas(64) uint8_t padded[4][LANES] = {};  // where channels do not fill the block: the center is worth 0
  std::memset(padded, center, sizeof padded);
  for (int64_t q = 0; q < quads; ++q) {
    const uint8_t* p[4];
    for (int64_t i = 0; i < 4; ++i) p[i] = image + bases[4 * q + i];
    if (channels % 16) {
      for (int64_t i = 0; i < 4; ++i) {
        std::memcpy(padded[i], p[i], channels);
        p[i] = padded[i];
      }
    }
    const uint8_t *a = p[0], *b = p[1], *c = p[2], *d = p[3];
    for (int64_t k = 0; k < 16 * blocks; ++k) {
      const uint32_t w = a[k], x = b[k], y = c[k], z = d[k];
      // Four bytes less the center at once: their highest bits, set before and put right after, stop what is borrowed.
      const uint32_t word = w | x << 8 | y << 16 | z << 24;
      words[k] = ((word | tops) - (centers & ~tops)) ^ ((word ^ ~centers) & tops);
      total[k] += static_cast<int32_t>(w + x + y + z) - 4 * center;
    }
    for (int64_t block = 0; block < blocks; ++block)
      std::memcpy(out + block * block_bytes + q * 64, words + 16 * block, 64);
  }
  for (int64_t k = 0; k < channels; ++k) sums[k] += total[k];
}

void widen(const uint8_t* values, int64_t count, int zero, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(values[i] - zero);
}

}  // namespace
}  // namespace bitorch_engine
