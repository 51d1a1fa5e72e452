#include "update/update.h"

#include <cmath>
#include <memory>

#include "runtime/parallel.h"

namespace bitorch_engine {

const Kernel<UpdateFunction> update_kernel{
    "update", {update_scalar, BE_ARM(update_neon), BE_X86(update_avx2), BE_X86(update_avx512)}};
const Kernel<RowMomentFunction> row_moment_kernel{
    "update.row_moment",
    {row_moment_scalar, BE_ARM(row_moment_neon), BE_X86(row_moment_avx2), BE_X86(row_moment_avx512)}};

}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT void be_update(const UpdateArguments* arguments) {
  const UpdateArguments& a = *arguments;
  const int threads = static_cast<int>(a.threads);
  if (a.s_kind == MOMENT_CHANNEL) {
    const auto row_moment = row_moment_kernel.pick();
    parallel_for(a.rows, 1 + (1 << 15) / (a.columns + 1), threads, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> scratch(new float[a.columns]);
      row_moment(a, scratch.get(), first, last);
    });
  }
  const std::unique_ptr<float[]> rates(new float[a.rows]);
  for (int64_t row = 0; row < a.rows; ++row) {
    float rate = a.levels_per_scale / a.scale[row];
    if (!a.add) rate = rate * a.lr;
    if (a.s_kind == MOMENT_CHANNEL)
      rate = rate / (std::sqrt(static_cast<const float*>(a.exp_avg_s)[row] * a.inverse_correction2) + a.eps);
    rates[row] = rate;
  }
  const auto update = update_kernel.pick();
  parallel_for(a.rows * a.columns, 1 << 15, threads,
               [&](int64_t first, int64_t last) { update(a, rates.get(), first, last); });
}
