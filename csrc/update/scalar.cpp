#include <cmath>

#include "bits/bits.h"
#include "update/block.h"

namespace bitorch_engine {
namespace {

float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Vectors of one element: what the operations of a Simd mean.
struct Scalar {
  using F = float;
  using I = int32_t;
  static constexpr int width = 1;

  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static I load_int(const int32_t* p) { return *p; }
  static void store_int(int32_t* p, I x) { *p = x; }
  static F floats(float x) { return x; }
  static I ints(int32_t x) { return x; }
  static F as_float(I x) { return float_of(x); }
  static I as_int(F x) { return bits_of(x); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F root(F x) { return std::sqrt(x); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F max_size(F a, F b) { return max(a, std::fabs(b)); }
  static F where_less(F a, F b, F x) { return a < b ? x : 0; }
  static I nearest(F x) { return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(std::nearbyint(x)); }
  // Unsigned in between: int32 wraps.
  static I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static I sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static I mul(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
  static I min(I a, I b) { return a < b ? a : b; }
  static I max(I a, I b) { return a > b ? a : b; }
  static I and_(I a, I b) { return a & b; }
  static I or_(I a, I b) { return a | b; }
  static I xor_(I a, I b) { return a ^ b; }
  static I with_sign(I x, I y) { return x | (y & INT32_MIN); }
  template <int n>
  static I left(I x) {
    return static_cast<I>(static_cast<uint32_t>(x) << n);
  }
  template <int n>
  static I right(I x) {
    return static_cast<I>(static_cast<uint32_t>(x) >> n);
  }
  template <int n>
  static I right_signed(I x) {
    return x >> n;
  }
  static float largest(F x) { return x; }

  static F from_half(I half) {
    const int32_t size = half & 0x7FFF, sign = static_cast<int32_t>((half & 0x8000u) << 16);
    const int32_t bits = size >= 31 << 10 ? size << 13 | 255 << 23 : (size << 13) + (112 << 23);
    const float value = size < 1 << 10 ? static_cast<float>(size) * 0x1p-24f : float_of(bits);
    return float_of(bits_of(value) | sign);
  }
  // Of a number that float16 has.
  static I to_half(F x) {
    const int32_t size = bits_of(x) & INT32_MAX, sign = right<16>(bits_of(x)) & 0x8000;
    const bool even = float_of(size) < 0x1p-14f;
    return sign | (even ? static_cast<int32_t>(float_of(size) * 0x1p24f) : (size >> 13) - (112 << 10));
  }

  static void lanes4(I* out) {
    for (int k = 0; k < 4; ++k) out[k] = k;
  }
  static void load4(const float* p, F* out) {
    for (int k = 0; k < 4; ++k) out[k] = p[k];
  }
  static void store4(float* p, const F* in) {
    for (int k = 0; k < 4; ++k) p[k] = in[k];
  }
  static void load_tops4(const uint16_t* p, I* out) {
    for (int k = 0; k < 4; ++k) out[k] = left<16>(p[k]);
  }
  static void store_tops4(uint16_t* p, const I* in) {
    for (int k = 0; k < 4; ++k) p[k] = static_cast<uint16_t>(right<16>(in[k]));
  }
  static void load_halves4(const uint16_t* p, F* out) {
    for (int k = 0; k < 4; ++k) out[k] = from_half(p[k]);
  }
  static void store_halves4(uint16_t* p, const F* in) {
    for (int k = 0; k < 4; ++k) p[k] = static_cast<uint16_t>(to_half(in[k]));
  }
  template <int cut, bool is_signed>
  static void load_codes4(const uint8_t* p, I* out) {
    for (int k = 0; k < 4; ++k) out[k] = is_signed ? (p[k] & 0x80) << 24 | (p[k] & 0x7F) << cut : p[k] << cut;
  }
  static void store_signed4(uint8_t* p, int32_t base, const I* in) {
    for (int k = 0; k < 4; ++k) p[k] = static_cast<uint8_t>((in[k] >> 5 & 0x80) | ((in[k] - base) & 0x7F));
  }
  static void store_positive4(uint8_t* p, int32_t base, const I* in, const I* values) {
    for (int k = 0; k < 4; ++k) p[k] = static_cast<uint8_t>(max(in[k] - base, values[k] > 0));
  }
  static void move_levels4(uint8_t* p, const I* steps) {
    for (int k = 0; k < 4; ++k) p[k] = static_cast<uint8_t>(min(max(p[k] + steps[k], 0), 255));
  }

  static int planes(int bits) { return bits; }
  static void read_levels(int bits, const uint8_t* packed, const uint8_t* residual, uint8_t* levels) {
    uint8_t low[BLOCK] = {};
    const int hidden = 8 - bits;
    unpack_scalar(packed, levels, BLOCK, bits);
    if (hidden) unpack_scalar(residual, low, BLOCK, hidden);
    for (int i = 0; i < BLOCK; ++i) levels[i] = static_cast<uint8_t>(levels[i] << hidden | low[i]);
  }
  static void write_levels(int bits, const uint8_t* levels, uint8_t* packed, uint8_t* residual) {
    uint8_t index[BLOCK], low[BLOCK];
    const int hidden = 8 - bits;
    for (int i = 0; i < BLOCK; ++i) {
      index[i] = static_cast<uint8_t>(levels[i] >> hidden);
      low[i] = static_cast<uint8_t>(levels[i] & ((1 << hidden) - 1));
    }
    pack_scalar(index, packed, BLOCK, bits);
    if (hidden) pack_scalar(low, residual, BLOCK, hidden);
  }
};

}  // namespace

void update_scalar(const StepRule& rule, const Blocks& blocks) { step_any_blocks<Scalar>(rule, blocks); }

float mean_square_scalar(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                         int64_t stride) {
  return mean_square_here<Scalar>(grad, bf16, factor, count, scratch, ahead, stride);
}

bool within_scalar(const float* values, int64_t count, float limit) {
  return within_here<Scalar>(values, count, limit);
}

}  // namespace bitorch_engine
