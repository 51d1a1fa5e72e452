// Loops over several threads: torch's own OpenMP threads, as many as the caller says.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bitorch_engine {

// Calls body(first, last) on pieces that cover 0 .. count, each a multiple of `grain` long but for the last.
// With one thread, or with one grain of work, no OpenMP construct is entered: a forked child (a DataLoader's worker)
// has lost OpenMP's threads and would wait for them for ever.
template <class Body>
static inline void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t pieces = std::min<int64_t>(threads, grains);
  if (pieces <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static, 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = grains * piece / pieces * grain;
    const int64_t last = std::min(count, grains * (piece + 1) / pieces * grain);
    if (first < last) body(first, last);
  }
}

}  // namespace bitorch_engine
