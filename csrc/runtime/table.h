// One row per kernel: its implementations by instruction set. Rows feed dispatch, the agreement tests and the
// benchmarks.
#pragma once

#include "runtime/isa.h"

namespace bitorch_engine {

// What the list of all kernels (table.cpp) sees of a row.
struct Row {
  const char* name;
  const void* const* functions;  // ISA_COUNT of them, null where there is none
};

template <class Function>
struct Kernel {
  const char* name;
  Function functions[ISA_COUNT];  // indexed by Isa; the scalar one is always there

  // The best one that the processor has and the cap allows. Inlined, always: a copy that a file for a later instruction
  // set emitted could be the one that the linker keeps for all.
  __attribute__((always_inline)) Function pick() const {
    int isa = current_isa();
    while (functions[isa] == nullptr) --isa;
    return functions[isa];
  }
  __attribute__((always_inline)) Row row() const { return {name, reinterpret_cast<const void* const*>(functions)}; }
};

}  // namespace bitorch_engine

// Entries of a row for one family of processors, null on the other.
#if defined(__x86_64__)
#define BE_X86(function) function
#else
#define BE_X86(function) nullptr
#endif
#if defined(__aarch64__)
#define BE_ARM(function) function
#else
#define BE_ARM(function) nullptr
#endif
