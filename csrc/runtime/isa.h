// Which instruction sets this processor has, and which one the kernels may use.
#pragma once

namespace bitorch_engine {

// In the order of preference. A cap is one of these: nothing above it is used.
enum Isa : int { SCALAR = 0, NEON = 1, AVX2 = 2, AVX512 = 3, AMX = 4, ISA_COUNT = 5 };

Isa best_isa();     // of this processor
Isa current_isa();  // best_isa(), or the cap

}  // namespace bitorch_engine

#define BE_EXPORT extern "C" __attribute__((visibility("default")))
