"""Every op: its schema, its reference, its shape function. ``ops/cpu`` and ``ops/triton`` register over them."""

from bitorch_engine.ops.library import define
from bitorch_engine.ops.reference import activation, bits, float_conv, gradient, linear, quantized_conv, update

_GEOMETRY = (
    "SymInt[] weight_shape, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, "
    "int groups, int[] pad"
)

pack = define("pack(Tensor values, int bits) -> Tensor", bits.pack, bits.pack_fake)
unpack = define("unpack(Tensor packed, int bits, SymInt count) -> Tensor", bits.unpack, bits.unpack_fake)
dequantize = define(
    "dequantize(Tensor packed, Tensor channel_scale, int bits, SymInt columns, ScalarType dtype, int taps=1) -> Tensor",
    bits.dequantize,
    bits.dequantize_fake,
)
quantize_activation = define(
    "quantize_activation(Tensor x, Tensor scale, Tensor low, int bits) -> (Tensor, Tensor, Tensor)",
    activation.quantize_activation,
    activation.quantize_activation_fake,
)
activation_values = define(
    "activation_values(Tensor codes, Tensor scale, Tensor low, int bits, SymInt[] shape, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    activation.activation_values,
    activation.activation_values_fake,
)
activation_grads = define(
    "activation_grads(Tensor grad, Tensor codes, Tensor beyond, Tensor low, int bits) -> (Tensor, Tensor)",
    activation.activation_grads,
    activation.activation_grads_fake,
)
quantize_gradient = define(
    "quantize_gradient(Tensor grad, Tensor? channel_factor, int bits, int keep, Tensor seed) -> (Tensor, Tensor)",
    gradient.quantize_gradient,
    gradient.quantize_gradient_fake,
)
conv = define(
    "conv(Tensor x, Tensor scale, Tensor low, int a_bit, Tensor packed, Tensor channel_scale, int w_bit, Tensor? bias, "
    f"{_GEOMETRY}) -> Tensor",
    quantized_conv.conv,
    quantized_conv.conv_fake,
)
conv_codes = define(
    "conv_codes(Tensor codes, SymInt[] shape, Tensor scale, Tensor low, Tensor poison, int a_bit, Tensor packed, "
    f"Tensor channel_scale, int w_bit, {_GEOMETRY}, ScalarType dtype, bool channels_last) -> Tensor",
    quantized_conv.conv_codes,
    quantized_conv.conv_codes_fake,
)
conv_grad_input = define(
    "conv_grad_input(Tensor grad_codes, Tensor grad_scale, Tensor packed, int w_bit, SymInt[] shape, "
    f"{_GEOMETRY}, ScalarType dtype, bool channels_last) -> Tensor",
    quantized_conv.conv_grad_input,
    quantized_conv.conv_grad_input_fake,
)
conv_grad_weight = define(
    "conv_grad_weight(Tensor grad_codes, Tensor grad_scale, Tensor codes, Tensor scale, Tensor low, int a_bit, "
    f"SymInt[] shape, {_GEOMETRY}, ScalarType dtype) -> Tensor",
    quantized_conv.conv_grad_weight,
    quantized_conv.conv_grad_weight_fake,
)
conv_grad_weight_float = define(
    "conv_grad_weight_float(Tensor grad, Tensor codes, Tensor scale, Tensor low, int a_bit, SymInt[] shape, "
    f"{_GEOMETRY}, ScalarType dtype, bool channels_last) -> Tensor",
    quantized_conv.conv_grad_weight_float,
    quantized_conv.conv_grad_weight_float_fake,
)
conv_grad_weight_dense = define(
    f"conv_grad_weight_dense(Tensor grad, Tensor x, {_GEOMETRY}) -> Tensor",
    quantized_conv.conv_grad_weight_dense,
    quantized_conv.conv_grad_weight_dense_fake,
)
update_ = define(
    "update_(Tensor(a!) packed, Tensor(b!) residual, Tensor scale, Tensor grad, Tensor(c!)? exp_avg_s,"
    " Tensor(d!)? exp_avg_l, int bits, float lr, float beta1, float beta2, float eps, float correction1,"
    " float correction2, float grad_factor, ScalarType dtype, int key) -> ()",
    update.update_,
)
add_ = define(
    "add_(Tensor(a!) packed, Tensor(b!) residual, Tensor scale, Tensor delta, int bits, int key) -> ()", update.add_
)
all_within = define("all_within(Tensor values, float limit) -> Tensor", update.all_within, update.all_within_fake)
mean_squares = define(
    "mean_squares(Tensor grad, float factor) -> Tensor", update.mean_squares, update.mean_squares_fake
)
conv_weight_only = define(
    f"conv_weight_only(Tensor x, Tensor packed, Tensor channel_scale, int bits, Tensor? bias, {_GEOMETRY}) -> Tensor",
    float_conv.conv_weight_only,
    float_conv.conv_weight_only_fake,
)
linear_weight_only = define(
    "linear_weight_only(Tensor x, Tensor packed, Tensor channel_scale, int bits, Tensor? bias, SymInt columns, "
    "int group_size=0) -> Tensor",
    linear.linear_weight_only,
    linear.linear_weight_only_fake,
)
linear_grad_input = define(
    "linear_grad_input(Tensor grad, Tensor packed, Tensor channel_scale, int bits, SymInt columns) -> Tensor",
    linear.linear_grad_input,
    linear.linear_grad_input_fake,
)
