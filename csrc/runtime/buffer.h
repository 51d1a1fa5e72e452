// Scratch memory of a call, aligned so that a vector never lies across two cache lines.
#pragma once

#include <cstdint>
#include <memory>

namespace bitorch_engine {

// Each thread keeps the last few blocks that it freed: memory that goes back to the system and comes again is cleared
// page by page, which took a third of the time of arranging a weight of 512 x 512 x 3 x 3.
void* take_scratch(int64_t bytes);
void free_scratch(void* memory);

struct FreeScratch {
  void operator()(void* memory) const { free_scratch(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], FreeScratch>;

// `count` values, not initialized. To be freed by the same thread.
template <class T>
static inline Buffer<T> new_buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(take_scratch(count * static_cast<int64_t>(sizeof(T)))));
}

}  // namespace bitorch_engine
