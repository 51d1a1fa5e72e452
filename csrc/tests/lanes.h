// What the checks of kernels share whose lanes of a vector are result channels.
#pragma once

#include "agreement.h"
#include "depthwise/depthwise.h"
#include "runtime/round_up.h"

namespace bitorch_engine {

inline int64_t whole_blocks(int64_t lanes) { return round_up(lanes, LANE_BLOCK); }

}  // namespace bitorch_engine
