// Kernels against their scalar rows, on random operands and on every instruction set of this processor: the same bytes.
// tests/ops/cpu/ compares with the references; this is for processors where Python and torch are not at hand.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "runtime/isa.h"
#include "runtime/table.h"

extern "C" int be_cap_isa(int isa);

namespace bitorch_engine {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33) ^ static_cast<uint32_t>(state_ >> 11);
  }
  int64_t between(int64_t least, int64_t most) { return least + bits() % static_cast<uint64_t>(most - least + 1); }
  bool flip() { return bits() >> 7 & 1; }
  float within(float limit) { return (static_cast<float>(bits() >> 8) * 0x1p-23f - 1) * limit; }

  // Mostly within `limit`, some far beyond it, some where rounding is a tie, some zeros of either sign.
  float number(float limit) {
    switch (between(0, 9)) {
      case 0: return within(1000 * limit);
      case 1: return static_cast<float>(between(-300, 300)) * 0.5f;
      case 2: return flip() ? 0.0f : -0.0f;
      default: return within(limit);
    }
  }
  std::vector<float> numbers(int64_t count, float limit) {
    std::vector<float> all(count);
    for (float& x : all) x = number(limit);
    return all;
  }
  // Now and then one that is not finite.
  void spoil(std::vector<float>& all) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    if (all.empty() || flip()) return;
    const float odd[3] = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()};
    for (int i = 0; i < 3; ++i) all[between(0, static_cast<int64_t>(all.size()) - 1)] = odd[between(0, 2)];
  }
  std::vector<uint8_t> bytes(int64_t count, int64_t most = 255) {
    std::vector<uint8_t> all(count);
    for (uint8_t& x : all) x = static_cast<uint8_t>(between(0, most));
    return all;
  }

 private:
  uint64_t state_;
};

// What a kernel wrote and returned.
class Written {
 public:
  template <class T>
  Written& add(const std::vector<T>& all) {
    return append(all.data(), all.size() * sizeof(T));
  }
  template <class T>
  Written& add(T one) {
    return append(&one, sizeof one);
  }
  bool operator==(const Written& other) const { return bytes_ == other.bytes_; }

 private:
  Written& append(const void* from, size_t count) {
    const uint8_t* first = static_cast<const uint8_t*>(from);
    bytes_.insert(bytes_.end(), first, first + count);
    return *this;
  }

  std::vector<uint8_t> bytes_;
};

class Agreement {
 public:
  // run(function, random) calls the kernel and gives what came of it; equal seeds have to make equal operands.
  template <class Function, class Run>
  void check(const Kernel<Function>& kernel, int rounds, const Run& run) {
    checked_.insert(kernel.name);
    for (int isa = SCALAR + 1; isa <= best_isa(); ++isa) {
      if (kernel.functions[isa] == nullptr) continue;
      int wrong = 0;
      for (int round = 0; round < rounds; ++round) {
        Random one(round), other(round);
        be_cap_isa(SCALAR);
        const auto expected = run(kernel.functions[SCALAR], one);
        be_cap_isa(isa);
        wrong += !(run(kernel.functions[isa], other) == expected);
      }
      report(kernel.name, isa, wrong, rounds);
    }
  }
  void report(const char* what, int isa, int wrong, int rounds) {
    std::printf("%-28s instruction set %d: %d of %d wrong\n", what, isa, wrong, rounds);
    failed_ |= wrong > 0;
  }
  bool failed() const { return failed_; }
  bool checked(const char* kernel) const { return checked_.count(kernel) > 0; }

 private:
  std::set<std::string> checked_;
  bool failed_ = false;
};

void check_binary(Agreement&);
void check_bits(Agreement&);
void check_conv(Agreement&);
void check_depthwise(Agreement&);
void check_float_conv(Agreement&);
void check_grad_weight(Agreement&);
void check_gradient(Agreement&);
void check_linear(Agreement&);
void check_lookup(Agreement&);
void check_qconv(Agreement&);
void check_quantize(Agreement&);
void check_square(Agreement&);
void check_update(Agreement&);
void check_winograd(Agreement&);

}  // namespace bitorch_engine
