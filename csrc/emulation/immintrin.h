// Stands in for the compiler's <immintrin.h> where the kernels for AVX-512 and AMX are compiled for AVX2 (EMULATE in
// CMakeLists.txt), so that their tests run on any x86-64 processor of the last ten years. SIMDe
// (https://github.com/simd-everywhere/simde) computes most of AVX-512; what its version 0.7.4 lacks is below, lane by
// lane as Intel's Intrinsics Guide has it. An intrinsic that neither has is an error of the compiler's own header,
// "target specific option mismatch": add it here.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace bitorch_engine {
namespace emulation {

template <class Lane, class Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(Lane);
  Lane at[count] = {};

  Lanes() = default;
  explicit Lanes(const Vector& vector) { std::memcpy(at, &vector, sizeof at); }
  Vector vector() const {
    Vector result;
    std::memcpy(&result, at, sizeof at);
    return result;
  }
};

// Lanes whose bit is not set are neither read nor written in memory, which may end before them.
template <class Lane, class Vector>
static inline Vector load(uint64_t mask, const void* from) {
  Lanes<Lane, Vector> lanes;
  for (int i = 0; i < lanes.count; ++i)
    if (mask >> i & 1) std::memcpy(&lanes.at[i], static_cast<const Lane*>(from) + i, sizeof(Lane));
  return lanes.vector();
}

template <class Lane, class Vector>
static inline void store(void* to, uint64_t mask, const Vector& vector) {
  const Lanes<Lane, Vector> lanes(vector);
  for (int i = 0; i < lanes.count; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<Lane*>(to) + i, &lanes.at[i], sizeof(Lane));
}

// As many lanes as both have, each changed by `function`.
template <class To, class Result, class From, class Vector, class Function>
static inline Result map(const Vector& vector, const Function& function) {
  const Lanes<From, Vector> from(vector);
  Lanes<To, Result> to;
  for (int i = 0; i < from.count && i < to.count; ++i) to.at[i] = static_cast<To>(function(from.at[i]));
  return to.vector();
}

template <class To, class Result, class From, class Vector>
static inline Result convert(const Vector& vector) {
  return map<To, Result, From>(vector, [](From x) { return x; });
}

// Both halves, each by an instruction of AVX2 or F16C.
template <class Result, class Half, class Vector, class Function>
static inline Result halves(const Vector& vector, const Function& function) {
  const Lanes<Half, Vector> from(vector);
  Lanes<decltype(function(from.at[0])), Result> to;
  for (int i = 0; i < 2; ++i) to.at[i] = function(from.at[i]);
  return to.vector();
}

static inline __m512i gather(const __m512i& source, __mmask16 mask, const __m512i& index, const void* base, int scale) {
  const Lanes<int32_t, __m512i> at(index);
  Lanes<int32_t, __m512i> lanes(source);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(&lanes.at[i], static_cast<const char*>(base) + int64_t{at.at[i]} * scale, 4);
  return lanes.vector();
}

// Bits of `classes`, from 0: quiet NaN, +0, -0, +infinity, -infinity, below the normal range, negative, signaling NaN.
static inline __mmask16 fpclass(const __m512& x, int classes) {
  const Lanes<uint32_t, __m512> bits(x);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t size = bits.at[i] & 0x7fffffff;
    const bool minus = bits.at[i] >> 31, nan = size > 0x7f800000, quiet = size >> 22 & 1;
    const bool tiny = size > 0 && size < 0x00800000, negative = minus && size > 0 && size < 0x7f800000;
    const unsigned is = (nan && quiet) | (size == 0 && !minus) << 1 | (size == 0 && minus) << 2 |
                        (size == 0x7f800000 && !minus) << 3 | (size == 0x7f800000 && minus) << 4 | tiny << 5 |
                        negative << 6 | (nan && !quiet) << 7;
    mask |= static_cast<unsigned>((is & static_cast<unsigned>(classes)) != 0) << i;
  }
  return static_cast<__mmask16>(mask);
}

// Where one operand is NaN the other one counts, which SIMDe has not. Only one of the 16 choices is here.
template <int choice>
static inline __m512 range(const __m512& a, const __m512& b) {
  static_assert(choice == 0xB, "the larger size of two, without sign");
  const Lanes<float, __m512> left(a), right(b);
  Lanes<float, __m512> lanes;
  for (int i = 0; i < lanes.count; ++i) lanes.at[i] = std::fmax(std::fabs(left.at[i]), std::fabs(right.at[i]));
  return lanes.vector();
}

// Halves against each other, as the compiler's own intrinsics reduce: the order of additions counts.
template <class Function>
static inline float reduce(const __m512& vector, const Function& function) {
  Lanes<float, __m512> lanes(vector);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes.at[i] = function(lanes.at[i], lanes.at[i + half]);
  return lanes.at[0];
}

}  // namespace emulation
}  // namespace bitorch_engine

#define BE_EMULATED(...) ::bitorch_engine::emulation::__VA_ARGS__

#define _mm_maskz_loadu_epi8(mask, from) BE_EMULATED(load<int8_t, __m128i>(mask, from))
#define _mm512_maskz_loadu_epi8(mask, from) BE_EMULATED(load<int8_t, __m512i>(mask, from))
#define _mm512_maskz_loadu_epi32(mask, from) BE_EMULATED(load<int32_t, __m512i>(mask, from))
#define _mm512_maskz_loadu_ps(mask, from) BE_EMULATED(load<float, __m512>(mask, from))
#define _mm256_maskz_loadu_epi16(mask, from) BE_EMULATED(load<int16_t, __m256i>(mask, from))
#define _mm512_maskz_loadu_epi16(mask, from) BE_EMULATED(load<int16_t, __m512i>(mask, from))
#define _mm512_mask_storeu_epi8(to, mask, x) BE_EMULATED(store<int8_t, __m512i>(to, mask, x))
#define _mm512_mask_storeu_ps(to, mask, x) BE_EMULATED(store<float, __m512>(to, mask, x))
#define _mm256_mask_storeu_epi16(to, mask, x) BE_EMULATED(store<int16_t, __m256i>(to, mask, x))
#define _mm_mask_storeu_epi8(to, mask, x) BE_EMULATED(store<int8_t, __m128i>(to, mask, x))
#define _mm512_mask_i32gather_epi32(source, mask, index, base, scale) \
  BE_EMULATED(gather(source, mask, index, base, scale))

#define _mm512_cvtepi8_epi32(x) BE_EMULATED(convert<int32_t, __m512i, int8_t>(x))
#define _mm512_cvtepu8_epi32(x) BE_EMULATED(convert<int32_t, __m512i, uint8_t>(x))
#define _mm512_cvtepi8_epi16(x) BE_EMULATED(convert<int16_t, __m512i, int8_t>(x))
#define _mm512_cvtepu8_epi16(x) BE_EMULATED(convert<int16_t, __m512i, uint8_t>(x))
#define _mm512_cvtepi16_epi32(x) BE_EMULATED(convert<int32_t, __m512i, int16_t>(x))
#define _mm512_cvtepu16_epi32(x) BE_EMULATED(convert<int32_t, __m512i, uint16_t>(x))
#define _mm512_cvtepi32_epi8(x) BE_EMULATED(convert<int8_t, __m128i, int32_t>(x))
#define _mm512_cvtepi32_epi16(x) BE_EMULATED(convert<int16_t, __m256i, int32_t>(x))
#define _mm512_cvtepi32_ps(x) BE_EMULATED(convert<float, __m512, int32_t>(x))
#define _mm512_cvtusepi32_epi8(x) \
  BE_EMULATED(map<uint8_t, __m128i, uint32_t>(x, [](uint32_t lane) { return lane < 255 ? lane : 255; }))
#define _mm512_cvtps_epi32(x) \
  BE_EMULATED(halves<__m512i, __m256>(x, [](const __m256& half) { return _mm256_cvtps_epi32(half); }))
#define _mm512_cvtph_ps(x) \
  BE_EMULATED(halves<__m512, __m128i>(x, [](const __m128i& half) { return _mm256_cvtph_ps(half); }))
#define _mm512_cvtps_ph(x, rounding) \
  BE_EMULATED(halves<__m256i, __m256>(x, [](const __m256& half) { return _mm256_cvtps_ph(half, rounding); }))

#define _mm512_srai_epi32(x, n) \
  BE_EMULATED(map<int32_t, __m512i, int32_t>(x, [](int32_t lane) { return lane >> (n); }))
#define _mm_maskz_set1_epi8(mask, x) _mm_and_si128(_mm_set1_epi8(x), simde_mm_movm_epi8(mask))
#define _mm512_shuffle_f32x4(a, b, lanes) simde_mm512_shuffle_f32x4(a, b, lanes)
#define _mm512_shuffle_i64x2(a, b, lanes) simde_mm512_shuffle_i64x2(a, b, lanes)
#define _mm512_fpclass_ps_mask(x, classes) BE_EMULATED(fpclass(x, classes))
#define _mm512_reduce_add_ps(x) BE_EMULATED(reduce(x, [](float a, float b) { return a + b; }))
#define _mm512_reduce_max_ps(x) BE_EMULATED(reduce(x, [](float a, float b) { return a > b ? a : b; }))
#undef _mm512_range_ps
#define _mm512_range_ps(a, b, choice) BE_EMULATED(range<choice>(a, b))
#undef _mm512_madd_epi16  // SIMDe 0.7.4 gives the name to the form with a mask
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
