// Numbers of which a plan was made, and which anyone may write who holds their memory: looked at by every call.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitorch_engine {

// ops/cpu/plans.py has the same fields.
struct Watch {
  static constexpr int MOST = 3;
  const void* places[MOST];  // null behind the last one
  int64_t bytes[MOST];
  uint8_t held[MOST][8];  // what they were

  bool changed() const {
    for (int i = 0; i < MOST && places[i]; ++i)
      if (std::memcmp(places[i], held[i], static_cast<size_t>(bytes[i])) != 0) return true;
    return false;
  }
};

// What planned calls return.
enum Outcome {
  DONE = 0,
  NOT_A_NUMBER = 1,  // all results are to be NaN
  CHANGED = 2,       // the plan does not hold, and nothing is done
};

}  // namespace bitorch_engine
