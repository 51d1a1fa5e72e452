#include "update/update.h"

#include <cmath>

#include "agreement.h"
#include "runtime/convert.h"

namespace bitorch_engine {
namespace {

// The blocks of a moment, in its kind's own form.
std::vector<uint8_t> moment(MomentKind kind, bool positive, int64_t blocks, Random& random) {
  std::vector<uint8_t> bytes(blocks * moment_bytes(kind));
  uint8_t* to = bytes.data();
  for (int64_t i = 0; i < blocks * BLOCK; ++i) {
    const float number = positive ? std::fabs(random.within(2)) : random.within(2);
    const uint16_t half = kind == MOMENT_F16 ? to_float16(number) : to_bfloat16(number);
    if (kind == MOMENT_F32) std::memcpy(to + 4 * i, &number, 4);
    if (kind == MOMENT_BF16 || kind == MOMENT_F16) std::memcpy(to + 2 * i, &half, 2);
    if (kind != MOMENT_8BIT) continue;
    to[i / BLOCK * BLOCK_ROW + i % BLOCK] = static_cast<uint8_t>(random.bits());
    const float unit = std::ldexp(1.0f, static_cast<int>(random.between(-30, 0)));
    if (i % BLOCK == 0) std::memcpy(to + i / BLOCK * BLOCK_ROW + BLOCK, &unit, sizeof unit);
  }
  return bytes;
}

Written step(UpdateFunction update, Random& random) {
  const int64_t count = random.between(1, 5);
  const MomentKind kinds[5] = {NONE, MOMENT_F32, MOMENT_BF16, MOMENT_F16, MOMENT_8BIT};
  StepRule rule{};
  rule.bits = static_cast<int>(random.between(1, 8));
  rule.beta1 = 0.9f;
  rule.rest1 = 1 - rule.beta1;
  rule.beta2 = 0.99f;
  rule.rest2 = 1 - rule.beta2;
  rule.least = 1e-8f;
  rule.grad_factor = random.flip() ? 1.0f : 0.3f;
  rule.grad_bf16 = random.flip();
  rule.first = kinds[random.between(0, 4)];
  rule.second = kinds[random.between(0, 4)];
  rule.key = random.bits();
  std::vector<uint8_t> packed = random.bytes(count * BLOCK / 8 * rule.bits);
  std::vector<uint8_t> residual = random.bytes(count * BLOCK / 8 * (8 - rule.bits));
  std::vector<uint8_t> first = moment(rule.first, false, count, random);
  std::vector<uint8_t> second = moment(rule.second, true, count, random);
  const std::vector<float> grad = random.numbers(count * BLOCK, 1);
  std::vector<uint16_t> halves;
  for (float x : grad) halves.push_back(to_bfloat16(x));
  std::vector<float> rate(count * BLOCK);
  for (float& one : rate) one = random.within(3) * 0x1p23f;
  update(rule, {packed.data(), residual.data(),
                rule.grad_bf16 ? static_cast<const void*>(halves.data()) : grad.data(), first.data(), second.data(),
                rate.data(), random.flip() ? BLOCK : 0, BLOCK * random.between(0, 1 << 20), count});
  return Written().add(packed).add(residual).add(first).add(second);
}

}  // namespace

void check_update(Agreement& agreement) {
  agreement.check(update_kernel, 500, step);
  agreement.check(mean_square_kernel, 100, [](MeanSquareFunction mean_square, Random& random) {
    const std::vector<float> grad = random.numbers(random.between(1, 700), 1);
    std::vector<uint16_t> halves;
    for (float x : grad) halves.push_back(to_bfloat16(x));
    const bool bf16 = random.flip();
    const void* values = bf16 ? static_cast<const void*>(halves.data()) : grad.data();
    const int64_t count = static_cast<int64_t>(grad.size());
    std::vector<float> scratch(mean_square_scratch(count));
    return Written().add(mean_square(values, bf16, 0.3f, count, scratch.data(), values, 0));
  });
  agreement.check(within_kernel, 200, [](WithinFunction within, Random& random) {
    std::vector<float> values(random.between(0, 200));
    for (float& x : values) x = random.within(2);
    if (random.between(0, 3) == 0) random.spoil(values);
    return Written().add(within(values.data(), static_cast<int64_t>(values.size()), random.flip() ? 2.0f : 1.99f));
  });
}

}  // namespace bitorch_engine
