// Packing of 1 to 8 bit values; bitorch_engine/bits/packing.py specifies the layout.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

// `count` values are a multiple of eight; packed bytes are count * bits / 8.
using PackFunction = void (*)(const uint8_t* values, uint8_t* packed, int64_t count, int bits);
using UnpackFunction = void (*)(const uint8_t* packed, uint8_t* values, int64_t count, int bits);

void pack_scalar(const uint8_t* values, uint8_t* packed, int64_t count, int bits);
void unpack_scalar(const uint8_t* packed, uint8_t* values, int64_t count, int bits);
void pack_avx2(const uint8_t* values, uint8_t* packed, int64_t count, int bits);
void unpack_avx2(const uint8_t* packed, uint8_t* values, int64_t count, int bits);
void unpack_avx512(const uint8_t* packed, uint8_t* values, int64_t count, int bits);

// Values first .. first + count - 1 of a packed stream, for any first and count.
void unpack_range(const uint8_t* packed, int64_t first, int64_t count, int bits, uint8_t* values);

extern const Kernel<PackFunction> pack_kernel;
extern const Kernel<UnpackFunction> unpack_kernel;

}  // namespace bitorch_engine

BE_EXPORT void be_pack(const uint8_t* values, uint8_t* packed, int64_t count, int bits, int threads);
