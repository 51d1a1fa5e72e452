// Rounding noise from a counter; bitorch_engine/ops/reference/noise.py specifies it.
#pragma once

#include <cstdint>

namespace bitorch_engine {

static inline uint32_t hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

}  // namespace bitorch_engine
