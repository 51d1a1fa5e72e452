#include "runtime/table.h"

#include "binary/binary.h"
#include "bits/bits.h"
#include "depthwise/depthwise.h"
#include "float_conv/float_conv.h"
#include "grad_weight/grad_weight.h"
#include "gradient/gradient.h"
#include "linear/linear.h"
#include "lookup/lookup.h"
#include "qconv/qconv.h"
#include "quantize/quantize.h"
#include "square/square.h"
#include "update/update.h"
#include "winograd/gradient.h"
#include "winograd/winograd.h"

namespace bitorch_engine {
namespace {

// Every kernel of the library.
const Row kernels[] = {
    pack_kernel.row(),
    unpack_kernel.row(),
    quantize_activation_kernel.row(),
    floats_kernel.row(),
    multiply_kernel.row(),
    decode_kernel.row(),
    finish_kernel.row(),
    split_kernel.row(),
    winograd::weights_kernel.row(),
    winograd::pixels_kernel.row(),
    winograd::multiply_kernel.row(),
    winograd::totals_kernel.row(),
    winograd::pixel_pair_kernel.row(),
    winograd::gradient_pair_kernel.row(),
    winograd::multiply_pairs_kernel.row(),
    winograd::taps_kernel.row(),
    interleave_kernel.row(),
    widen_kernel.row(),
    largest_by_column_kernel.row(),
    largest_kernel.row(),
    round_kernel.row(),
    straight_through_kernel.row(),
    depthwise_kernel.row(),
    square_kernel.row(),
    pair_pixels_kernel.row(),
    quantize_pairs_kernel.row(),
    depthwise_gradient_kernel.row(),
    multiply_line_kernel.row(),
    binary::multiply_kernel.row(),
    binary::sign_kernel.row(),
    binary::arrange_kernel.row(),
    lookup::sign_entries_kernel.row(),
    lookup::pair_entries_kernel.row(),
    lookup::panel_kernel.row(),
    lookup::signs_kernel.row(),
    lookup::pairs_kernel.row(),
    lookup::turn_kernel.row(),
    split_digits_kernel.row(),
    split_bytes_kernel.row(),
    dot_digits_kernel.row(),
    dot_kernel.row(),
    update_kernel.row(),
    mean_square_kernel.row(),
    within_kernel.row(),
};
constexpr int kernel_count = sizeof(kernels) / sizeof(kernels[0]);

}  // namespace
}  // namespace bitorch_engine

using namespace bitorch_engine;

BE_EXPORT int be_kernel_count() { return kernel_count; }

BE_EXPORT const char* be_kernel_name(int index) { return kernels[index].name; }

BE_EXPORT int be_kernel_has(int index, int isa) { return kernels[index].functions[isa] != nullptr; }
