#include "update/body.h"

namespace bitorch_engine {

void update_avx512(const UpdateArguments& arguments, const float* rates, int64_t first, int64_t last) {
  update(arguments, rates, first, last);
}

void row_moment_avx512(const UpdateArguments& arguments, float* scratch, int64_t first, int64_t last) {
  row_moment(arguments, scratch, first, last);
}

}  // namespace bitorch_engine
