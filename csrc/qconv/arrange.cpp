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

const Kernel<SplitFunction> split_kernel{
    "qconv.split", {split_scalar, nullptr, BE_X86(split_avx2), BE_X86(split_avx512)}};

namespace {

constexpr int64_t GRAIN = 1 << 16;  // values a thread takes at least

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
    constexpr int64_t SOME = 8;
    const auto split = split_kernel.pick();
    const int64_t grain = std::max<int64_t>(SOME, GRAIN / std::max<int64_t>(length(), 1));
    parallel_for(count, grain, threads, [&](int64_t first, int64_t last) {
      const auto scratch = new_buffer<uint8_t>(SOME * length());
      for (int64_t row = first; row < last; row += SOME) {
        const int64_t some = std::min(SOME, last - row);
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

// Four rows of 16 values to 16 rows of four, and their sums.
template <class Value>
void interleave(const uint8_t* const* rows, uint8_t* to, int32_t* sums) {
  const uint8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  uint8_t four[4 * BLOCK];  // apart from the operands, so that this becomes vector code
  int32_t sum[BLOCK];
  for (int64_t o = 0; o < BLOCK; ++o) {
    four[4 * o] = a[o];
    four[4 * o + 1] = b[o];
    four[4 * o + 2] = c[o];
    four[4 * o + 3] = d[o];
    sum[o] =
        (static_cast<Value>(a[o]) + static_cast<Value>(b[o])) + (static_cast<Value>(c[o]) + static_cast<Value>(d[o]));
  }
  std::memcpy(to, four, sizeof four);
  for (int64_t o = 0; o < BLOCK; ++o) sums[o] += sum[o];
}

template <class Value>
int32_t sum(const uint8_t* values, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<Value>(values[i]);
  return total;
}

constexpr int64_t TOGETHER = 4;  // blocks: then a cache line of a row's channels is used whole

// The values of `count` blocks, and the sum of each of their result channels at each tap, read as `Value`: sums of
// a tap are sum_step behind those of the one before. What fills up is worth nothing whatever it decodes to: the image
// is 0 there.
template <class Value>
void arrange_blocks(const Rows& rows, const Phase& phase, int64_t group, int64_t first, int64_t count, uint8_t* out,
                    int32_t* sums, int64_t sum_step) {
  const Product& p = rows.p;
  const int64_t channels = p.image_channels, depth = p.image_depth, whole = channels & ~int64_t{3};
  const int64_t results = std::min(count * BLOCK, p.result_channels - first * BLOCK), length = BLOCK * phase.depth;
  const bool filled = channels == depth && phase.depth == static_cast<int64_t>(phase.taps.size()) * depth;
  if (length > 0 && (!filled || results != count * BLOCK))
    std::memset(out, 0, count * length);
  const auto place = [&](int64_t o, int64_t c) {
    return out + o / BLOCK * length + (c & ~int64_t{3}) * BLOCK + o % BLOCK * 4 + c % 4;
  };
  for (const Tap& tap : phase.taps) {
    std::memset(sums, 0, count * BLOCK * sizeof *sums);
    if (p.rows_are_results) {
      for (int64_t o = 0; o < results; ++o) {
        const uint8_t* from = rows.at(group * p.result_channels + first * BLOCK + o, tap.weight);
        uint8_t* to = place(o, 0);
        sums[o] += sum<Value>(from, channels);
        for (int64_t c = 0; c < whole; c += 4) std::memcpy(to + c * BLOCK, from + c, 4);
        for (int64_t c = whole; c < channels; ++c) *place(o, c) = from[c];
      }
    } else {
      const auto row = [&](int64_t c) { return rows.at(group * channels + c, tap.weight) + first * BLOCK; };
      const int64_t full = results & ~(BLOCK - 1);
      for (int64_t c = 0; c < whole; c += 4) {
        const uint8_t* four[4] = {row(c), row(c + 1), row(c + 2), row(c + 3)};
        for (int64_t o = 0; o < full; o += BLOCK) {
          interleave<Value>(four, place(o, c), sums + o);
          for (const uint8_t*& values : four) values += BLOCK;
        }
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t o = c < whole ? full : 0; o < results; ++o) {
          *place(o, c) = row(c)[o];
          sums[o] += static_cast<Value>(row(c)[o]);
        }
    }
    out += depth * BLOCK;
    sums += sum_step;
  }
}

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

// Values of the arranged weight, padding included: bytes are values * bits / 8.
BE_EXPORT int64_t be_qconv_arranged_values(const Geometry* geometry, int scatter, int rows_are_results) {
  return Product(*geometry, scatter, rows_are_results).arranged_values();
}

// packed: the canonical stream.  out: the arranged one, of out_bits: `bits`, or 8 for signed codes.
// sums: (taps of all phases, at most those of the kernel; groups * blocks * 16) int32, the sum of the codes that each
// result has at a tap.
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
    const int64_t values = BLOCK * phase.depth, taps = static_cast<int64_t>(phase.taps.size());
    const int64_t sum_step = blocks * BLOCK;
    const int64_t strips = (p.blocks() + TOGETHER - 1) / TOGETHER;
    const int used = taps * p.image_channels * blocks < GRAIN ? 1 : threads;
    parallel_for(p.groups * strips, 1, used, [&](int64_t begin, int64_t end) {
      const auto scratch = new_buffer<uint8_t>(codes ? 0 : TOGETHER * values);
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t group = strip / strips, first = strip % strips * TOGETHER;
        const int64_t count = std::min(TOGETHER, p.blocks() - first), block = group * p.blocks() + first;
        uint8_t* place = codes ? out + phase.weights + block * values : scratch.get();
        int32_t* sum = sums + phase.first_tap * sum_step + block * BLOCK;
        if (codes) {
          arrange_blocks<int8_t>(rows, phase, group, first, count, place, sum, sum_step);
        } else {
          arrange_blocks<uint8_t>(rows, phase, group, first, count, place, sum, sum_step);
          for (int64_t t = 0; t < taps; ++t, sum += sum_step)
            for (int64_t o = 0; o < count * BLOCK; ++o)
              sum[o] = sum[o] * step + static_cast<int32_t>(p.image_channels) * low;
          pack(place, out + (phase.weights + block * values) / 8 * bits, count * values, bits);
        }
      }
    });
  }
}
