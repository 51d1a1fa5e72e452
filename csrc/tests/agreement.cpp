#include "agreement.h"

extern "C" {
int be_kernel_count();
const char* be_kernel_name(int index);
}

int main() {
  using namespace bitorch_engine;
  Agreement agreement;
  check_binary(agreement);
  check_bits(agreement);
  check_conv(agreement);
  check_depthwise(agreement);
  check_float_conv(agreement);
  check_grad_weight(agreement);
  check_gradient(agreement);
  check_linear(agreement);
  check_lookup(agreement);
  check_qconv(agreement);
  check_quantize(agreement);
  check_square(agreement);
  check_update(agreement);
  check_winograd(agreement);
  bool all = true;
  for (int kernel = 0; kernel < be_kernel_count(); ++kernel) {
    if (agreement.checked(be_kernel_name(kernel))) continue;
    std::printf("%s has no check in csrc/tests\n", be_kernel_name(kernel));
    all = false;
  }
  return agreement.failed() || !all;
}
