#include "quantize/quantize.h"

namespace bitorch_engine {

const Kernel<QuantizeActivationFunction> quantize_activation_kernel{"quantize_activation", {quantize_activation_scalar}};

}  // namespace bitorch_engine
