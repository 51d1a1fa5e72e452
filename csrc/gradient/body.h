// The kernels of gradient.h as short loops of one width over arrays in the L1 cache, which every compiler vectorizes.
// Included once per instruction set.
#include <cmath>
#include <cstring>

#include "gradient/gradient.h"
#include "runtime/convert.h"
#include "runtime/noise.h"

namespace bitorch_engine {
namespace {

constexpr int64_t COUNT = 256;  // values at a time; less where a line is short, but always whole vectors
constexpr int64_t VECTOR = 16;

// As integers, floats without sign are in order, and NaN is above infinity.
uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffff; }

void largest_by_column(const float* x, int64_t rows, int64_t columns, float* largest) {
  for (int64_t r = 0; r < rows; ++r, x += columns)
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t now = bits_of(largest[c]), size = size_bits(x[c]);
      largest[c] = float_of(size > now ? size : now);
    }
}

float largest(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = size_bits(x[i]);
    most = size > most ? size : most;
  }
  return float_of(most);
}

void round(const float* x, int64_t count, const Rounding& r, uint64_t first, uint64_t stride, int8_t* codes) {
  alignas(64) float value[COUNT], inverse[COUNT];
  alignas(64) int32_t code[COUNT];
  alignas(64) uint32_t noise[COUNT];
  const int32_t limit = static_cast<int32_t>(r.limit);
  for (int64_t start = 0; start < count; start += COUNT) {
    const int64_t some = count - start < COUNT ? count - start : COUNT, n = (some + VECTOR - 1) / VECTOR * VECTOR;
    if (some < n) std::memset(value, 0, sizeof value);
    std::memcpy(value, x + start, some * sizeof(float));
    if (r.factor && r.factor_step) {
      for (int64_t i = 0; i < some; ++i) value[i] = value[i] * r.factor[start + i];
    } else if (r.factor) {
      const float factor = *r.factor;
      for (int64_t i = 0; i < n; ++i) value[i] = value[i] * factor;
    }
    if (r.inverse_step) {
      if (some < n) std::memset(inverse, 0, sizeof inverse);
      std::memcpy(inverse, r.inverse + start, some * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) inverse[i] = *r.inverse;
    }
    const uint64_t place = first + static_cast<uint64_t>(start) * stride;
    if ((place + COUNT * stride) >> 32 == 0) {
      const uint32_t low = static_cast<uint32_t>(place), step = static_cast<uint32_t>(stride);
      for (int64_t i = 0; i < n; ++i) noise[i] = hash32((low + static_cast<uint32_t>(i) * step) ^ r.seed);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t index = place + static_cast<uint64_t>(i) * stride;
        noise[i] = hash32(static_cast<uint32_t>(index) ^ hash32(static_cast<uint32_t>(index >> 32)) ^ r.seed);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const float uniform = static_cast<float>(static_cast<int32_t>(noise[i] >> 8)) * 0x1p-24f;
      const float size = float_of(size_bits(value[i])) * inverse[i];
      const float number = size > 0.0f ? size : 0.0f;  // NaN: 0
      const float bounded = number < 128.0f ? number : 128.0f;
      const int32_t whole = static_cast<int32_t>(bounded);
      const int32_t up = whole + (uniform < bounded - static_cast<float>(whole) ? 1 : 0);
      const int32_t kept = up < limit ? up : limit;
      const int32_t sign = static_cast<int32_t>(bits_of(value[i])) >> 31;  // -1 or 0
      code[i] = (kept ^ sign) - sign;
    }
    for (int64_t i = 0; i < some; ++i) codes[start + i] = static_cast<int8_t>(code[i]);
  }
}

// sum: what the result is added to.
double straight_through(const float* grad, const uint8_t* index, const uint8_t* beyond, int64_t count, float low,
                        int bits, float* out, double sum = 0) {
  alignas(64) int32_t at[COUNT], outside[COUNT];
  alignas(64) float g[COUNT], kept[COUNT], product[COUNT];
  const int32_t top = (1 << bits) - 1;
  const float step = bits == 1 ? 2.0f : 1.0f;
  const bool sign = bits == 1;
  for (int64_t start = 0; start < count; start += COUNT) {
    const int64_t some = count - start < COUNT ? count - start : COUNT, n = (some + VECTOR - 1) / VECTOR * VECTOR;
    if (some < n) {
      std::memset(at, 0, sizeof at);
      std::memset(outside, 0, sizeof outside);
      std::memset(g, 0, sizeof g);
    }
    for (int64_t i = 0; i < some; ++i) at[i] = index[start + i];
    for (int64_t i = 0; i < some; ++i) outside[i] = beyond[start + i];
    std::memcpy(g, grad + start, some * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {
      const float code = static_cast<float>(at[i]) * step + low;
      const bool lowest = at[i] == 0, highest = at[i] == top, beyond_it = outside[i] != 0;
      const bool clipped = beyond_it & (lowest | highest);
      const float error = lowest ? 0.0f : beyond_it ? -0.25f : 0.25f;
      const float slope = sign | clipped ? code : error;
      kept[i] = clipped ? 0.0f : g[i];
      product[i] = g[i] * slope;
    }
    float lanes[VECTOR] = {};
    for (int64_t i = 0; i < n; i += VECTOR)
      for (int64_t j = 0; j < VECTOR; ++j) lanes[j] += product[i + j];
    for (float lane : lanes) sum += static_cast<double>(lane);
    std::memcpy(out + start, kept, some * sizeof(float));
  }
  return sum;
}

}  // namespace
}  // namespace bitorch_engine
