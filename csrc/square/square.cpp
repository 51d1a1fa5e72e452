#include "square/square.h"

namespace bitorch_engine {

const Kernel<SquareFunction> square_kernel{
    "square.multiply", {square_scalar, nullptr, BE_X86(square_avx2), BE_X86(square_avx512)}};
const Kernel<PairFunction> pair_pixels_kernel{
    "square.pair_pixels", {pair_pixels_scalar, nullptr, BE_X86(pair_pixels_avx2), BE_X86(pair_pixels_avx512)}};
const Kernel<QuantizePairsFunction> quantize_pairs_kernel{
    "square.quantize_pairs",
    {quantize_pairs_scalar, nullptr, BE_X86(quantize_pairs_avx2), BE_X86(quantize_pairs_avx512)}};

}  // namespace bitorch_engine
