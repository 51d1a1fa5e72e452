"""Every op: its schema, its reference, its shape function. ``ops/cpu`` and ``ops/triton`` register over them."""

from bitorch_engine.ops.library import define
from bitorch_engine.ops.reference import bits, update

pack = define("pack(Tensor values, int bits) -> Tensor", bits.pack, bits.pack_fake)
unpack = define("unpack(Tensor packed, int bits, int count) -> Tensor", bits.unpack, bits.unpack_fake)

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
