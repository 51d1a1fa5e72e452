"""How the peers are called, each at its best settings: torch's own operators and, where it is installed, onnxruntime.

A peer's name begins with its kind, which goals name: "fp32: torch NCHW". Peers that this torch or this processor
does not have are left out.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bitorch_engine.cli.bench.timing import Function


@dataclass(frozen=True)
class ConvShape:
    """A square 2d convolution with padding that keeps the size."""

    in_channels: int
    out_channels: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups > 1 else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        batch = f" batch {self.batch}" if self.batch > 1 else ""
        channels = f"{self.in_channels}-{self.out_channels}"
        return f"{kind}{channels} {self.side}x{self.side} {self.kernel}x{self.kernel}{stride}{batch}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel

    def image(self, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        """Random integers low .. high - 1, channels last."""
        image = torch.randint(low, high, (self.batch, self.in_channels, self.side, self.side), dtype=dtype)
        return image.contiguous(memory_format=torch.channels_last)


def conv_peers(shape: ConvShape) -> dict[str, Function]:
    """float32 and bfloat16 with float inputs; int8 with uint8 inputs and outputs, which asks less of it than of us."""
    found: dict[str, Function] = {}
    x, w = torch.randn(shape.batch, shape.in_channels, shape.side, shape.side), torch.randn(shape.weight_shape)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w)]
    geometry = {"stride": shape.stride, "padding": shape.padding, "groups": shape.groups}
    found["fp32: torch NCHW"] = partial(F.conv2d, x, w, **geometry)
    found["fp32: torch channels_last"] = partial(F.conv2d, *last, **geometry)
    half = [t.bfloat16() for t in last]
    found["bf16: torch channels_last"] = partial(F.conv2d, *half, **geometry)
    for engine in ("x86", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            _add(found, f"int8: torch quantized {engine}", partial(_torch_quantized, shape, engine))
    _add(found, "int8: torch onednn.qconv2d", lambda: _torch_qconv(shape))
    if has_onnxruntime():
        _add(found, "int8: onnxruntime QLinearConv NHWC", lambda: _onnx_conv(shape))
    return found


def linear_peers(rows: int, out_features: int, in_features: int, copies: int) -> dict[str, Function]:
    """``copies`` weights take turns, so that none is found in the cache where they are more than it holds."""
    found: dict[str, Function] = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(rows, in_features, dtype=dtype)
        weights = [torch.randn(out_features, in_features, dtype=dtype) for _ in range(copies)]
        found[f"{kind}: torch"] = in_turn([partial(F.linear, x, w) for w in weights])
    _add(found, "torch int4: group 128", lambda: _torch_int4(rows, out_features, in_features, copies))
    if has_onnxruntime():
        for block in (32, 128):
            name = f"onnxruntime int4: block {block}"
            _add(found, name, partial(_onnx_int4, rows, out_features, in_features, block, copies))
    return found


def fused_adamw(shape: tuple[int, ...], grad: torch.Tensor) -> Function:
    """One step of torch's fused float32 AdamW."""
    weight = torch.nn.Parameter(torch.randn(shape) * 0.02)
    weight.grad = grad.clone()
    return torch.optim.AdamW([weight], lr=1e-3, fused=True).step


def in_turn(functions: list[Function]) -> Function:
    """A function that calls the next of them each time."""
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(functions)
        return functions[position]()

    return functions[0] if len(functions) == 1 else call


def has_onnxruntime() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def _add(found: dict[str, Function], name: str, make: Callable[[], Function]) -> None:
    """Put a peer in, if it can be made and called here."""
    try:
        function = make()
        function()
    except (RuntimeError, NotImplementedError, AttributeError):
        return
    found[name] = function


def _torch_quantized(shape: ConvShape, engine: str) -> Function:
    ops = torch.ops.quantized
    n = shape.out_channels
    scales, zeros = torch.full((n,), 0.02), torch.zeros(n, dtype=torch.long)
    last = torch.channels_last
    x = (torch.rand(shape.batch, shape.in_channels, shape.side, shape.side) * 4).contiguous(memory_format=last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 says that quantized tensors will be removed
        image = torch.quantize_per_tensor(x, 0.02, 0, torch.quint8).contiguous(memory_format=last)
        weight = torch.quantize_per_channel(torch.randn(shape.weight_shape), scales, zeros, 0, torch.qint8)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        stride, padding = [shape.stride] * 2, [shape.padding] * 2
        packed = ops.conv2d_prepack(weight, torch.zeros(n), stride, padding, [1, 1], shape.groups)
    finally:
        torch.backends.quantized.engine = before
    return lambda: ops.conv2d(image, packed, 0.5, 64)  # the packed weight knows its engine


def _torch_qconv(shape: ConvShape) -> Function:
    n = shape.out_channels
    x = shape.image(0, 255, torch.uint8)
    weight = torch.randint(-127, 127, shape.weight_shape, dtype=torch.int8)
    scales, zeros, bias = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.long), torch.zeros(n)
    geometry = ([shape.stride] * 2, [shape.padding] * 2, [1, 1], shape.groups)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, 0.02, 0, *geometry, list(x.shape))
    more: tuple[Any, ...] = (packed, scales, zeros, bias, *geometry, 0.5, 64, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qconv2d_pointwise(x, 0.02, 0, *more)


def _torch_int4(rows: int, out_features: int, in_features: int, copies: int) -> Function:
    # With bfloat16 activations: float32 ones take a path that is 30 times slower.
    x = torch.randn(rows, in_features, dtype=torch.bfloat16)
    scales_and_zeros = torch.randn(in_features // 128, out_features, 2, dtype=torch.bfloat16)
    values = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return in_turn([partial(multiply, x, w, 128, scales_and_zeros) for w in weights])


# onnxruntime ---------------------------------------------------------------------------------------------------------


def _onnx_conv(shape: ConvShape) -> Function:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    weight = np.random.default_rng(0).integers(-127, 127, shape.weight_shape).astype(np.int8)
    channels = shape.out_channels
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w": weight,
        "w_scale": np.full(channels, 0.01, np.float32),
        "w_zero": np.zeros(channels, np.int8),
        "y_scale": np.float32(0.5),
        "y_zero": np.uint8(128),
    }
    x = shape.image(0, 255, torch.uint8).permute(0, 2, 3, 1).numpy()
    return _onnx_session(
        "QLinearConv",
        ["x", *constants],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        {"x": x},
        TensorProto.UINT8,
        channels_last=1,
        kernel_shape=[shape.kernel] * 2,
        pads=[shape.padding] * 4,
        strides=[shape.stride] * 2,
        group=shape.groups,
    )


def _onnx_int4(rows: int, out_features: int, in_features: int, block: int, copies: int) -> Function:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    random = np.random.default_rng(0)
    blocks = -(-in_features // block)
    weight = random.integers(0, 255, (out_features, blocks, block // 2)).astype(np.uint8)
    scales = random.random(out_features * blocks).astype(np.float32)
    constants = [numpy_helper.from_array(value, name) for name, value in (("w", weight), ("scales", scales))]
    x = random.random((rows, in_features)).astype(np.float32)
    attributes = {"K": in_features, "N": out_features, "bits": 4, "block_size": block, "accuracy_level": 4}
    inputs = ["x", "w", "scales"]
    sessions = [
        _onnx_session("MatMulNBits", inputs, constants, {"x": x}, TensorProto.FLOAT, **attributes)
        for _ in range(copies)
    ]
    return in_turn(sessions)


def _onnx_session(
    operator: str, inputs: list[str], constants: list[Any], feeds: dict[str, Any], kind: int, **attributes: Any
) -> Function:
    """A model of one operator, with inputs and output bound, so that a call copies nothing."""
    import onnxruntime
    from onnx import helper

    node = helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)
    shapes = [helper.make_tensor_value_info(name, kind, value.shape) for name, value in feeds.items()]
    graph = helper.make_graph([node], "g", shapes, [helper.make_tensor_value_info("y", kind, None)], constants)
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Its threads would go on spinning after a call, on the cores that the next contestant needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    (y,) = session.run(None, feeds)
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
    return lambda: session.run_with_iobinding(binding)
