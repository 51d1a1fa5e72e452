#include "runtime/isa.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bitorch_engine {
namespace {

#if defined(__x86_64__)
// x86-64-v3, for which the files are compiled. A virtual machine may hide one of them; what else v3 has comes with
// these.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

#if defined(BE_EMULATE)
// Compiled for AVX2, with csrc/emulation.
bool has_avx512() { return has_avx2(); }
bool has_amx() { return has_avx2(); }
#else
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
         __builtin_cpu_supports("avx512vpopcntdq");
}

// The processor's word (leaf 7, EDX bits 24 and 25), and the kernel's leave to use the tiles' state, asked once.
bool has_amx() {
#if defined(__linux__)
  unsigned eax = 7, ebx, ecx = 0, edx;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if ((edx >> 24 & 3) != 3) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!has_avx2()) return SCALAR;
  if (has_avx512()) return has_amx() ? AMX : AVX512;
  return AVX2;
#elif defined(__aarch64__)
  return NEON;
#else
  return SCALAR;
#endif
}

std::atomic<int>& cap() {
  static std::atomic<int> value{best_isa()};
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return static_cast<Isa>(cap().load(std::memory_order_relaxed)); }

}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT int be_best_isa() { return best_isa(); }

// Returns 0, or -1 where this processor does not have it.
BE_EXPORT int be_cap_isa(int isa) {
  const bool known = isa == SCALAR || (isa > SCALAR && isa <= best_isa() && (isa == NEON) == (best_isa() == NEON));
  if (!known) return -1;
  cap().store(isa);
  return 0;
}
