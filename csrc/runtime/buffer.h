// Scratch memory of a call, aligned so that a vector never lies across two cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace bitorch_engine {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// `count` values, not initialized.
template <class T>
static inline Buffer<T> new_buffer(int64_t count) {
  constexpr int64_t LINE = 64;
  void* memory = std::aligned_alloc(LINE, (count * static_cast<int64_t>(sizeof(T)) + LINE) / LINE * LINE);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace bitorch_engine
