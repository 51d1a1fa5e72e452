#pragma once

#include <cstdint>

namespace bitorch_engine {

// The least multiple of `unit` that is not below `value`.
static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace bitorch_engine
