#include "runtime/buffer.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace bitorch_engine {

#ifdef __SANITIZE_ADDRESS__

// Of exactly the size and never kept, so that AddressSanitizer sees where it ends and when it is gone.
void* take_scratch(int64_t bytes) {
  void* memory;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return memory;
}

void free_scratch(void* memory) { std::free(memory); }

#else

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t LARGEST = 16 << 20;  // bytes of a block that is kept
constexpr int KEPT = 4;

// A line before the memory tells its size.
struct Block {
  int64_t bytes;
};

struct Cache {
  Block* blocks[KEPT] = {};
  ~Cache() {
    for (Block* block : blocks) std::free(block);
  }
};

thread_local Cache cache;

}  // namespace

void* take_scratch(int64_t bytes) {
  Block** best = nullptr;
  for (Block*& block : cache.blocks)
    if (block && block->bytes >= bytes && (!best || block->bytes < (*best)->bytes)) best = &block;
  Block* block;
  if (best) {
    block = *best;
    *best = nullptr;
  } else {
    block = static_cast<Block*>(std::aligned_alloc(LINE, (bytes + 2 * LINE - 1) / LINE * LINE));
    if (!block) throw std::bad_alloc();
    block->bytes = bytes;
  }
  return reinterpret_cast<char*>(block) + LINE;
}

void free_scratch(void* memory) {
  Block* block = reinterpret_cast<Block*>(static_cast<char*>(memory) - LINE);
  // Into a free place, or that of the smallest; what is too large is not kept.
  Block** least = &cache.blocks[0];
  for (Block*& kept : cache.blocks)
    if (*least && (!kept || kept->bytes < (*least)->bytes)) least = &kept;
  if (block->bytes <= LARGEST && (!*least || (*least)->bytes < block->bytes)) std::swap(*least, block);
  std::free(block);
}

#endif

}  // namespace bitorch_engine
