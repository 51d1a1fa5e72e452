#include "quantize/quantize.h"

namespace bitorch_engine {

const Kernel<QuantizeActivationFunction> quantize_activation_kernel{
    "quantize_activation", {quantize_activation_scalar, nullptr, nullptr, BE_X86(quantize_activation_avx512)}};

}  // namespace bitorch_engine
