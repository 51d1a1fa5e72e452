// The weight in the order in which the engine reads it, and back into signed bytes.
//
//   arranged[phase][group][block of 16 result channels][k / 4][16 channels][4 of k]     k = (tap of the phase, channel)
//
// It is one stream of values, packed as bits/packing.py says; or, where it is used once (in training), signed bytes.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bits/bits.h"
#include "qconv/product.h"
#include "qconv/qconv.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<SplitFunction> split_kernel{"qconv.split", {split_scalar, nullptr, nullptr, BE_X86(split_avx512)}};

namespace {

void to_codes(uint8_t* index, int64_t count, int bits) {
  const uint8_t low = static_cast<uint8_t>(lowest_code(bits)), step = bits == 1 ? 2 : 1;
  for (int64_t i = 0; i < count; ++i) index[i] = static_cast<uint8_t>(index[i] * step + low);
}

// The weight's rows, unpacked, as [row][tap][channel].
struct Rows {
  int64_t count, channels;  // of all groups; of one row
  const Product& p;
  Buffer<uint8_t> values;

  Rows(const Product& p, const uint8_t* packed, int bits, bool codes, int threads)
      : count(p.groups * (p.rows_are_results ? p.result_channels : p.image_channels)),
        channels(p.rows_are_results ? p.image_channels : p.result_channels),
        p(p),
        values(new_buffer<uint8_t>(count * length())) {
    constexpr int64_t TOGETHER = 8;
    const auto split = split_kernel.pick();
    const int64_t grain = std::max<int64_t>(TOGETHER, (1 << 16) / std::max<int64_t>(length(), 1));
    parallel_for(count, grain, threads, [&](int64_t first, int64_t last) {
      const auto scratch = new_buffer<uint8_t>(TOGETHER * length());
      for (int64_t row = first; row < last; row += TOGETHER) {
        const int64_t some = std::min(TOGETHER, last - row);
        uint8_t* to = values.get() + row * length();
        uint8_t* index = p.taps == 1 ? to : scratch.get();
        unpack_range(packed, row * length(), some * length(), bits, index);
        if (codes) to_codes(index, some * length(), bits);
        if (p.taps > 1) split(index, some, channels, p.taps, to);
      }
    });
  }

  int64_t length() const { return channels * p.taps; }
  const uint8_t* at(int64_t row, int64_t tap) const { return values.get() + row * length() + tap * channels; }
};

// Four rows of 16 bytes to 16 rows of four.
void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, uint8_t* to) {
  uint8_t four[4 * BLOCK];  // apart from the operands, so that this becomes vector code
  for (int64_t o = 0; o < BLOCK; ++o) {
    four[4 * o] = a[o];
    four[4 * o + 1] = b[o];
    four[4 * o + 2] = c[o];
    four[4 * o + 3] = d[o];
  }
  std::memcpy(to, four, sizeof four);
}

template <class Value>
int32_t sum(const uint8_t* values, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<Value>(values[i]);
  return total;
}

template <class Value>
void add_to(int32_t* sums, const uint8_t* values, int64_t count) {
  if (count == BLOCK)
    for (int64_t i = 0; i < BLOCK; ++i) sums[i] += static_cast<Value>(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<Value>(values[i]);
}

// The values of one block, and the sum of each of its result channels, read as `Value`. What fills up is worth nothing
// whatever it decodes to: the image is 0 there.
template <class Value>
void arrange_block(const Rows& rows, const Phase& phase, int64_t group, int64_t block, uint8_t* out, int32_t* sums) {
  const Product& p = rows.p;
  const int64_t channels = p.image_channels, depth = p.image_depth, whole = channels & ~int64_t{3};
  const int64_t present = std::min(BLOCK, p.result_channels - block * BLOCK);
  if (channels != depth || phase.depth != static_cast<int64_t>(phase.taps.size()) * depth || present != BLOCK)
    std::memset(out, 0, BLOCK * phase.depth);
  std::memset(sums, 0, BLOCK * sizeof *sums);
  for (const Tap& tap : phase.taps) {
    // Where the tap's byte of a result channel and an image channel is.
    const auto at = [&](int64_t o, int64_t c) {
      return p.rows_are_results ? rows.at(group * p.result_channels + block * BLOCK + o, tap.weight) + c
                                : rows.at(group * channels + c, tap.weight) + block * BLOCK + o;
    };
    if (p.rows_are_results) {
      for (int64_t o = 0; o < present; ++o) {
        const uint8_t* from = at(o, 0);
        sums[o] += sum<Value>(from, channels);
        for (int64_t c = 0; c < whole; c += 4) std::memcpy(out + c * BLOCK + 4 * o, from + c, 4);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) add_to<Value>(sums, at(0, c), present);
      for (int64_t c = 0; c < whole; c += 4) {
        if (present == BLOCK)
          interleave(at(0, c), at(0, c + 1), at(0, c + 2), at(0, c + 3), out + c * BLOCK);
        else
          for (int64_t o = 0; o < present; ++o)
            for (int64_t i = 0; i < 4; ++i) out[c * BLOCK + 4 * o + i] = *at(o, c + i);
      }
    }
    for (int64_t c = whole; c < channels; ++c)
      for (int64_t o = 0; o < present; ++o) out[whole * BLOCK + 4 * o + c - whole] = *at(o, c);
    out += depth * BLOCK;
  }
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// Values of the arranged weight, padding included: bytes are values * bits / 8.
BE_EXPORT int64_t be_qconv_arranged_values(const Geometry* geometry, int scatter, int rows_are_results) {
  return Product(*geometry, scatter, rows_are_results).arranged_values();
}

BE_EXPORT int64_t be_qconv_phases(const Geometry* geometry, int scatter, int rows_are_results) {
  return static_cast<int64_t>(Product(*geometry, scatter, rows_are_results).phases.size());
}

// packed: the canonical stream.  out: the arranged one, of out_bits: `bits`, or 8 for signed codes.
// sums: (phases, groups * blocks * 16) int32, the sum of the codes that each result has in a phase.
BE_EXPORT void be_qconv_arrange(const Geometry* geometry, int scatter, int rows_are_results, const uint8_t* packed,
                                int bits, int out_bits, uint8_t* out, int32_t* sums, int threads) {
  const Product p(*geometry, scatter, rows_are_results);
  const bool codes = out_bits == 8;
  const Rows rows(p, packed, bits, codes, threads);
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  const int64_t blocks = p.groups * p.blocks();
  const auto pack = pack_kernel.pick();
  for (size_t f = 0; f < p.phases.size(); ++f) {
    const Phase& phase = p.phases[f];
    const int64_t values = BLOCK * phase.depth;
    parallel_for(blocks, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(values, 1)), threads,
                 [&](int64_t first, int64_t last) {
      const std::unique_ptr<uint8_t[]> scratch(codes ? nullptr : new uint8_t[values]);
      for (int64_t b = first; b < last; ++b) {
        uint8_t* place = codes ? out + phase.weights + b * values : scratch.get();
        int32_t* sum = sums + (static_cast<int64_t>(f) * blocks + b) * BLOCK;
        if (codes) {
          arrange_block<int8_t>(rows, phase, b / p.blocks(), b % p.blocks(), place, sum);
        } else {
          arrange_block<uint8_t>(rows, phase, b / p.blocks(), b % p.blocks(), place, sum);
          const int64_t products = static_cast<int64_t>(phase.taps.size()) * p.image_channels;
          for (int64_t o = 0; o < BLOCK; ++o) sum[o] = sum[o] * step + static_cast<int32_t>(products) * low;
        }
        if (!codes) pack(place, out + (phase.weights + b * values) / 8 * bits, values, bits);
      }
    });
  }
}
