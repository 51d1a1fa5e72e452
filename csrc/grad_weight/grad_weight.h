// The gradient of a convolution's weight: a matrix product of gradient and activation over the pixels. In integers it
// runs on the multiply kernels of the convolution engine; where the gradient is float, the caller multiplies floats.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

constexpr int64_t LANES = 64;  // channels that are interleaved together

// Bytes of `channels` (at most LANES) channels of 4 * quads pixels, which lie at image + bases[pixel], as signed bytes
// (less `center`) in the order of the engine's weights: out[channel / 16][quad][channel % 16][4], a block of channels
// every block_bytes. Channels that fill up a block are 0. sums: of each channel, added up.
using InterleaveFunction = void (*)(const uint8_t* image, const int64_t* bases, int64_t quads, int64_t channels,
                                    int center, int8_t* out, int64_t block_bytes, int32_t* sums);

void interleave_scalar(const uint8_t*, const int64_t*, int64_t, int64_t, int, int8_t*, int64_t, int32_t*);
void interleave_avx2(const uint8_t*, const int64_t*, int64_t, int64_t, int, int8_t*, int64_t, int32_t*);
void interleave_avx512(const uint8_t*, const int64_t*, int64_t, int64_t, int, int8_t*, int64_t, int32_t*);
void interleave_neon(const uint8_t*, const int64_t*, int64_t, int64_t, int, int8_t*, int64_t, int32_t*);

extern const Kernel<InterleaveFunction> interleave_kernel;

// out[i] = values[i] - zero
using WidenFunction = void (*)(const uint8_t* values, int64_t count, int zero, float* out);

void widen_scalar(const uint8_t*, int64_t, int, float*);
void widen_avx2(const uint8_t*, int64_t, int, float*);
void widen_avx512(const uint8_t*, int64_t, int, float*);
void widen_neon(const uint8_t*, int64_t, int, float*);

extern const Kernel<WidenFunction> widen_kernel;

}  // namespace bitorch_engine
