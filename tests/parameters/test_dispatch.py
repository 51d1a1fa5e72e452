"""Torch's operators on packed weights: reads see the dequantized weight, writes reach code and residual or raise."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitorch_engine import nBitConv2d, nBitConvParameter

WIDTHS = range(1, 9)
EVERY_THIRD = torch.arange(108).view(4, 3, 3, 3) % 3 == 0


def on_grid(weight: nBitConvParameter) -> Tensor:
    """Other values that the weight's codes and scale can hold."""
    form = weight.format
    index = torch.randint(0, 2**weight.w_bit, weight.shape)
    return (form.low + form.step * index) * weight.scale


class TestReads:
    OPERATORS: tuple[tuple[str, Callable[[Tensor], Any]], ...] = (
        ("add", lambda w: w + 1),
        ("reversed subtraction", lambda w: 1 - w),
        ("matmul", lambda w: w.flatten(1) @ w.flatten(1).T),
        ("einsum", lambda w: torch.einsum("oihw->ohwi", w)),
        ("index", lambda w: w[1, :, 0]),
        ("boolean mask", lambda w: w[w > 0]),
        ("norm", lambda w: w.norm()),
        ("std", lambda w: w.std()),
        ("cat", lambda w: torch.cat([w, w])),
        ("stack", lambda w: torch.stack([w, w])),
        ("chunk", lambda w: w.chunk(2)[1]),
        ("permute", lambda w: w.permute(3, 2, 1, 0)),
        ("where", lambda w: torch.where(w > 0, w, 0)),
        ("comparison", lambda w: w >= 0.1),
        ("to a list", lambda w: torch.tensor(w.detach().tolist())),
        ("numpy", lambda w: torch.from_numpy(w.detach().numpy().copy())),
        ("to integers", lambda w: w.to(torch.int32)),
        ("foreach", lambda w: torch._foreach_mul([w, w], 2.0)[1]),
        ("new_zeros", lambda w: w.new_zeros(3)),
        ("zeros_like", lambda w: torch.zeros_like(w)),
        ("ones_like", lambda w: torch.ones_like(w, dtype=torch.float64)),
        ("full_like", lambda w: torch.full_like(w, 2.0, memory_format=torch.preserve_format)),
    )

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("operator", [f for _, f in OPERATORS], ids=[name for name, _ in OPERATORS])
    def test_an_operator_sees_the_dequantized_weight(self, operator: Callable[[Tensor], Any], transposed: bool) -> None:
        weight = nBitConvParameter(torch.randn(4, 6, 3, 3), w_bit=3, transposed=transposed)
        result, expected = operator(weight), operator(weight.dequantize())
        assert not isinstance(result, nBitConvParameter)
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert torch.equal(result.detach(), expected)
        with torch.no_grad():
            assert torch.equal(operator(weight), expected)

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 6, 5), (4, 6, 2, 3, 2), (4, 6, 1, 1), (0, 6, 3, 3)])
    def test_dequantizing_to_channels_last_changes_the_memory_order_alone(
        self, shape: tuple[int, ...], transposed: bool
    ) -> None:
        weight = nBitConvParameter(torch.randn(shape), w_bit=3, transposed=transposed)
        found = weight.dequantize(channels_last=True)
        assert torch.equal(found, weight.dequantize())
        assert found.movedim(1, -1).is_contiguous()

    def test_convolutions_of_channels_last_images_are_those_of_others(self) -> None:
        weight, x = nBitConvParameter(torch.randn(4, 6, 3, 3), w_bit=3), torch.randn(2, 6, 5, 5)
        outputs, grads = [], []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            image = x.contiguous(memory_format=memory_format).requires_grad_()
            y = F.conv2d(image, weight)
            assert y.is_contiguous(memory_format=memory_format)
            outputs.append(y)
            grads.append(torch.autograd.grad(y.square().sum(), (image, weight)))
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight bias"])
    def test_a_convolution_gives_the_gradients_that_are_wanted(self, wanted: str) -> None:
        weight = nBitConvParameter(torch.randn(40, 36, 3, 3), w_bit=3)
        x, bias = torch.randn(2, 36, 6, 7), torch.randn(40)
        operands = {"x": x, "weight": weight, "bias": bias}
        for name, operand in operands.items():
            operand.requires_grad_(name in wanted.split())
        dense = {name: tensor.detach().double().requires_grad_() for name, tensor in operands.items()}
        dense["weight"] = weight.dequantize().double().requires_grad_()
        grad = torch.randn(2, 40, 3, 3)
        found, exact = (F.conv2d(o["x"], o["weight"], o["bias"], stride=2, padding=1) for o in (operands, dense))
        found.backward(torch.nn.functional.pad(grad, (0, 1)))
        exact.backward(torch.nn.functional.pad(grad, (0, 1)).double())
        for name, operand in operands.items():
            if operand.requires_grad:
                torch.testing.assert_close(operand.grad, dense[name].grad.float(), rtol=1e-4, atol=1e-4)
            else:
                assert operand.grad is None

    def test_gradients_flow_through_any_operator(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 6, 3, 3), w_bit=3)
        dense = weight.dequantize().requires_grad_()
        for w in (weight, dense):
            (w.flatten(1).tanh() @ w[0].view(-1)).square().sum().backward()
        assert type(weight.grad) is Tensor and torch.allclose(weight.grad, dense.grad)

    def test_a_regularizer_on_the_weight_reaches_its_gradient(self) -> None:
        layer = nBitConv2d(2, 3, 3)
        (0.5 * layer.weight.square().sum()).backward()
        assert torch.allclose(layer.weight.grad, layer.weight.dequantize())

    def test_it_can_be_copied_into_a_float_tensor(self) -> None:
        weight, target = nBitConvParameter(torch.randn(4, 6), w_bit=3), torch.zeros(4, 6)
        with torch.no_grad():
            target.copy_(weight)
            target.add_(weight, alpha=2.0)
        assert torch.allclose(target, 3 * weight.dequantize())

    def test_random_tensors_like_it_are_float(self) -> None:
        weight = nBitConvParameter(torch.randn(40, 60), w_bit=1)
        for like in (torch.rand_like(weight), torch.randn_like(weight)):
            assert type(like) is Tensor and like.shape == weight.shape and like.unique().numel() > 2000


class TestWritesOfTheWhole:
    @pytest.mark.parametrize("residual", [True, False], ids=["with residual", "without residual"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_a_write_of_values_on_the_grid_is_exact_and_draws_no_noise(
        self, w_bit: int, dtype: torch.dtype, residual: bool
    ) -> None:
        weight = nBitConvParameter(torch.randn(5, 7, 3, 3, dtype=dtype), w_bit=w_bit)
        if not residual:
            weight.drop_residual_()
        scale, generator = weight.channel_scale.clone(), torch.get_rng_state()
        writes: list[Callable[[Tensor], Any]] = [
            weight.copy_,
            weight.write_,
            lambda values: setattr(weight, "data", values),
        ]
        for write in writes:
            torch.manual_seed(w_bit)
            values = on_grid(weight).to(dtype)
            torch.set_rng_state(generator)
            with torch.no_grad():
                write(values)
            assert torch.equal(weight.dequantize(), values)
            assert torch.equal(weight.channel_scale, scale)
            assert weight.noise_step == 0 and torch.equal(torch.get_rng_state(), generator)

    @pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_its_own_values_in_a_wider_dtype_are_on_the_grid(self, dtype: torch.dtype, wide: torch.dtype) -> None:
        for w_bit in WIDTHS:
            weight = nBitConvParameter(torch.randn(5, 7, dtype=dtype), w_bit=w_bit)
            codes = weight.codes
            with torch.no_grad():
                weight.copy_(weight.dequantize().to(wide))
            assert torch.equal(weight.codes, codes) and weight.noise_step == 0

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_other_values_are_written_with_their_residual_without_bias(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(64, 200) * 0.1, w_bit=w_bit, scale=0.4 / 2**w_bit)
        values = (torch.rand(64, 200) - 0.5) * 0.25
        weight.write_(values)
        error = weight.level_values() - values
        level = 0.4 / 2**w_bit * (2 if w_bit == 1 else 1) / 2 ** (8 - w_bit)
        assert float(error.abs().max()) < level * 1.01
        assert abs(float(error.mean())) < 4 * level / error.numel() ** 0.5

    def test_values_beyond_the_range_are_clamped(self) -> None:
        for w_bit in WIDTHS:
            weight = nBitConvParameter(torch.randn(2, 3), w_bit=w_bit)
            weight.write_(torch.tensor([[1e4, -1e4, 1e4], [-1e4, 1e4, -1e4]]))
            assert weight.codes.tolist() == [
                [weight.format.high, weight.format.low, weight.format.high],
                [weight.format.low, weight.format.high, weight.format.low],
            ]

    @pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 1e4], ids="{:g} times as large".format)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_floats_that_the_scale_cannot_hold_bring_a_new_one(self, w_bit: int, size: float) -> None:
        values = torch.randn(64, 9, 3, 3) * size
        wanted = nBitConvParameter(values, w_bit=w_bit)
        writes: list[Callable[[Tensor, Tensor], Any]] = [
            lambda weight, new: weight.copy_(new),
            lambda weight, new: weight.data.copy_(new),
            lambda weight, new: setattr(weight, "data", new),
            lambda weight, new: nn.utils.vector_to_parameters(new.view(-1), [weight]),
        ]
        for write in writes:
            weight = nBitConvParameter(torch.randn(64, 9, 3, 3) * 0.2, w_bit=w_bit)
            with torch.no_grad():
                write(weight, values)
            assert torch.equal(weight.channel_scale, wanted.channel_scale)
            assert torch.equal(weight.codes, wanted.codes)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    @pytest.mark.parametrize("size", [1e-3, 100.0], ids="{:g} times as large".format)
    def test_a_channel_of_another_size_takes_a_new_scale_of_its_own(self, size: float, w_bit: int) -> None:
        """A small one would be rounded to zeros, or take the old size, and a large one be clamped."""
        weight = nBitConvParameter(torch.randn(16, 9, 3, 3), w_bit=w_bit)
        kept, scale = on_grid(weight), weight.channel_scale.clone()
        values = kept.clone()
        values[3] = torch.randn(9, 3, 3) * size
        wanted = nBitConvParameter(values[3:4], w_bit=w_bit)
        with torch.no_grad():
            weight.copy_(values)
        others = [i for i in range(16) if i != 3]
        assert torch.equal(weight.channel_scale[others], scale[others])
        assert torch.equal(weight.dequantize()[others], kept[others])
        assert torch.equal(weight.dequantize()[3:4], wanted.dequantize())
        weight.multiply_channels_(-torch.ones(16))  # as folding a BatchNorm may
        values = weight.dequantize()
        values[3] *= size
        wanted = nBitConvParameter(values[3:4], w_bit=w_bit)
        with torch.no_grad():
            weight.copy_(values)
        assert torch.equal(weight.channel_scale[others], -scale[others])
        assert torch.equal(weight.dequantize()[others], values[others])
        assert torch.equal(weight.dequantize()[3:4], wanted.dequantize())

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_channels_that_keep_their_scale_are_written_as_without_the_others(
        self, w_bit: int, dtype: torch.dtype, transposed: bool
    ) -> None:
        weight = nBitConvParameter(torch.randn(8, 8, 3, 3), w_bit=w_bit, learn_scale=True, transposed=transposed)
        weight = nBitConvParameter(weight.to(dtype))
        weight.multiply_channels_(torch.tensor([1.0, -1.0]).repeat(4))
        weight.scale_moments = torch.ones(2, 8)
        beside, new, others = copy.deepcopy(weight), [2, 5], [0, 1, 3, 4, 6, 7]
        for size, moved in ((1e3, 1.0), (1e6, 1.1)):  # on the grid of codes, and off it
            rows = weight.to_rows(weight.dequantize())
            rows[others] *= moved
            beside.write_(weight.from_rows(rows))
            rows[new] = torch.randn(2, 72).to(dtype) * size
            weight.take_(weight.from_rows(rows))
            assert torch.equal(weight.channel_scale[others], beside.channel_scale[others])
            assert torch.equal(weight.level_values()[others], beside.level_values()[others])
            best = nBitConvParameter(rows[new], w_bit=w_bit)
            assert torch.equal(weight.channel_scale[new], best.channel_scale)
            assert torch.equal(weight.level_values()[new], best.level_values())
            assert weight.scale_moments.mean(0).tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
            beside = copy.deepcopy(weight)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_averages_and_backups_come_back_on_the_old_grid(self, w_bit: int) -> None:
        """What SAM, Lookahead, and the swap of averaged weights write."""
        weight = nBitConvParameter(torch.randn(64, 9, 3, 3), w_bit=w_bit)
        backup, scale, average = weight.dequantize(), weight.channel_scale.clone(), weight.dequantize()
        for _ in range(10):
            weight.update(weight, grad=torch.randn(weight.shape), lr=0.02)
            average.lerp_(weight.dequantize(), 0.3)
        trained = weight.dequantize()
        assert not torch.equal(trained, backup)
        with torch.no_grad():
            for values in (average, trained, backup.lerp(trained, 0.5), backup):
                weight.data.copy_(values)
                assert torch.equal(weight.channel_scale, scale)
            assert torch.equal(weight.dequantize(), backup)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_arithmetic_in_place_keeps_the_scale(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(6, 9), w_bit=w_bit)
        scale = weight.channel_scale.clone()
        with torch.no_grad():
            weight.add_(100.0)
            assert bool((weight.codes == weight.format.high).all())
            weight.mul_(0.01)
        assert torch.equal(weight.channel_scale, scale)

    def test_a_write_broadcasts(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3), w_bit=4, scale=0.5)
        with torch.no_grad():
            weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        assert weight.dequantize().tolist() == [[0.5, -1.0, 2.0]] * 2

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_write_of_values_that_are_not_finite_is_refused_and_changes_nothing(self, value: float) -> None:
        weight = nBitConvParameter(torch.randn(2, 3), w_bit=4)
        before = copy.deepcopy(vars(weight))
        with torch.no_grad(), pytest.raises(ValueError, match="cannot write NaN or Inf into a packed weight"):
            weight.copy_(torch.full((2, 3), value))
        with torch.no_grad(), pytest.raises(ValueError, match="cannot write NaN or Inf into a packed weight"):
            weight.mul_(value)
        for name, old in before.items():
            new = getattr(weight, name)
            assert torch.equal(new, old) if isinstance(old, Tensor) else new == old, name

    def test_packed_to_packed_takes_over_everything(self) -> None:
        source, target = (nBitConvParameter(torch.randn(4, 3), w_bit=3) for _ in range(2))
        with torch.no_grad():
            source.add_(0.01)
            target.copy_(source)
        for name, value in vars(source).items():
            other = getattr(target, name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
        assert source.packed is not target.packed

    @pytest.mark.parametrize("other", [{"w_bit": 4}, {"w_bit": 3, "transposed": True}], ids=["width", "layout"])
    def test_packed_of_another_kind_is_refused(self, other: dict[str, Any]) -> None:
        weight = nBitConvParameter(torch.randn(4, 4), w_bit=3)
        with torch.no_grad(), pytest.raises(ValueError, match="a packed weight of .* cannot take one of"):
            weight.copy_(nBitConvParameter(torch.randn(4, 4), **other))

    def test_another_memory_order_leaves_it_as_it_is(self) -> None:
        layer = nBitConv2d(3, 8, 3)
        values = layer.weight.dequantize()
        nn.utils.convert_conv2d_weight_memory_format(layer, torch.channels_last)
        assert torch.equal(layer.weight.dequantize(), values)
        layer.weight.data.resize_as_(torch.empty(8, 3, 3, 3, dtype=torch.float64))
        assert torch.equal(layer.weight.dequantize(), values)

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: w.t_(),
            lambda w: w.transpose_(0, 1),
            lambda w: w.unsqueeze_(0),
            lambda w: w.squeeze_(),
            lambda w: w.resize_(3, 2),
            lambda w: w.resize_as_(torch.empty(3)),
            lambda w: w.as_strided_((3,), (1,)),
            lambda w: w.set_(torch.empty(2, 3)),
        ],
    )
    def test_another_shape_is_refused_and_changes_nothing(self, change: Callable[..., Any]) -> None:
        weight = nBitConvParameter(torch.randn(2, 3), w_bit=4)
        values = weight.dequantize()
        with pytest.raises(NotImplementedError, match="shape and memory cannot be changed in place"):
            change(weight.data)
        assert weight.shape == (2, 3) and torch.equal(weight.dequantize(), values)
        weight.data.detach_()

    def test_a_write_tells_autograd(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3), w_bit=4)
        y = (weight * weight).sum()
        with torch.no_grad():
            weight.add_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_an_update_tells_autograd(self) -> None:
        layer = nBitConv2d(2, 3, 3)
        y = layer(torch.randn(1, 2, 5, 5, requires_grad=True)).sum()
        layer.weight.update(layer.weight, grad=torch.ones(layer.weight.shape))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_a_write_outside_of_no_grad_is_refused_as_for_any_leaf(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            weight.add_(1.0)

    @given(st.integers(1, 8), st.floats(-0.2, 0.2), st.floats(0.5, 1.5))
    def test_in_place_arithmetic_acts_on_the_weight_with_its_residual(self, w_bit: int, add: float, mul: float) -> None:
        level = 1.2 / 256
        step = level * 2 ** (8 - w_bit)  # of the codes
        weight = nBitConvParameter(torch.randn(20, 50) * 0.1, w_bit=w_bit, scale=step / 2 if w_bit == 1 else step)
        lowest = weight.format.low * float(weight.channel_scale[0]) - step / 2 + level / 2
        before = weight.level_values()
        with torch.no_grad():
            weight.mul_(mul).add_(torch.ones(20, 50), alpha=add)
        expected = ((before * mul).clamp(lowest, lowest + 255 * level) + add).clamp(lowest, lowest + 255 * level)
        error = weight.level_values() - expected
        assert float(error.abs().max()) < 2.01 * level
        assert abs(float(error.mean())) < 5 * level / error.numel() ** 0.5 + 0.01 * level


class TestWritesOfAPart:
    WRITES: tuple[tuple[str, Callable[[Tensor], Any]], ...] = (
        ("through view", lambda w: w.view(-1).zero_()),
        ("to an element", lambda w: w.__setitem__((0, 0, 0, 0), 0.25)),
        ("to a row", lambda w: w.__setitem__(0, 0.25)),
        ("to a slice", lambda w: w.__setitem__((slice(0, 2), 1), 0.25)),
        ("to a row of .data", lambda w: w.data.__setitem__(0, 0.25)),
        ("through flatten of .data", lambda w: w.data.flatten(1).mul_(0)),
        ("through detach and select", lambda w: w.detach().select(0, 1).zero_()),
        ("through permute", lambda w: w.permute(1, 0, 2, 3).zero_()),
        ("through unbind", lambda w: w.unbind(0)[1].zero_()),
        ("through a view of a view", lambda w: w[0][1].zero_()),
        ("through view_as and copy_", lambda w: w.view_as(torch.zeros(w.shape)).copy_(torch.zeros(w.shape))),
        ("with index_fill_", lambda w: w.index_fill_(0, torch.tensor([1]), 0.25)),
        ("with masked_fill_", lambda w: w.masked_fill_(EVERY_THIRD, 0.25)),
        ("with a boolean mask", lambda w: w.__setitem__(EVERY_THIRD, 0.25)),
        ("into out=", lambda w: torch.add(torch.zeros(w.shape), 0.25, out=w)),
        ("into a view's out=", lambda w: torch.add(torch.zeros(w[0].shape), 0.25, out=w[0])),
    )

    @pytest.mark.parametrize("write", [f for _, f in WRITES], ids=[name for name, _ in WRITES])
    def test_a_write_arrives_or_is_refused_but_never_lost(self, write: Callable[[Tensor], Any]) -> None:
        weight = nBitConvParameter(torch.randn(4, 3, 3, 3) * 0.2, w_bit=4)
        # every weight at the middle of its code, so that a mask is the same for code and residual as for the code
        weight.drop_residual_().load_training_state_(
            weight.training_state() | {"residual": torch.full((54,), 0x88).byte()}
        )
        before = weight.level_values().view(weight.shape)
        dense = before.clone()
        write(dense)
        with torch.no_grad():
            try:
                write(weight)
            except NotImplementedError as refusal:
                message = str(refusal)
            else:
                message = None
        values = weight.level_values().view(weight.shape)
        if message is None:
            assert float((values - dense).abs().max()) < 1.01 * float(weight.channel_scale.max()) / 16
        else:
            assert "packed weight" in message and torch.equal(values, before)


NEEDS_ONE_DRAW = pytest.mark.skipif(
    "erfinv_" in inspect.getsource(nn.init._no_grad_trunc_normal_), reason="this torch draws in steps"
)


class TestInitialization:
    @pytest.mark.parametrize(
        ("fill", "mean", "std"),
        [
            (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), 0.0, (3 * 288) ** -0.5),
            (lambda w: nn.init.kaiming_normal_(w), 0.0, (2 / 288) ** 0.5),
            (lambda w: nn.init.xavier_uniform_(w), 0.0, (2 / (288 + 576)) ** 0.5),
            (lambda w: nn.init.xavier_normal_(w, gain=10.0), 0.0, 10 * (2 / (288 + 576)) ** 0.5),
            (lambda w: nn.init.normal_(w, 0.0, 20.0), 0.0, 20.0),
            (lambda w: nn.init.uniform_(w, -3.0, 3.0), 0.0, 3.0 / 3**0.5),
            pytest.param(lambda w: nn.init.trunc_normal_(w, std=0.5), 0.0, 0.5, marks=NEEDS_ONE_DRAW),
            (lambda w: nn.init.zeros_(w), 0.0, 0.0),
            (lambda w: nn.init.ones_(w), 1.0, 0.0),
            (lambda w: nn.init.constant_(w, -7.0), -7.0, 0.0),
            (lambda w: nn.init.constant_(w, 1e-3), 1e-3, 0.0),
        ],
        ids=["kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "normal_", "uniform_",
             "trunc_normal_", "zeros_", "ones_", "constant_ of another size", "constant_ that is small"],
    )  # fmt: skip
    def test_the_weight_gets_the_distribution_asked_for(
        self, fill: Callable[[Tensor], Tensor], mean: float, std: float
    ) -> None:
        weight = nBitConv2d(32, 64, 3, w_bit=6).weight  # whose values are below 0.06 before
        assert fill(weight) is weight
        values = weight.dequantize()
        size = max(abs(mean), std)
        assert float(values.mean()) == pytest.approx(mean, abs=0.05 * size)
        assert float(values.std()) == pytest.approx(std, abs=0.05 * size)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_zeros_are_zero_or_nearly(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(8, 6, 3, 3), w_bit=w_bit)
        before = weight.channel_scale.clone()
        nn.init.zeros_(weight)
        largest = float(weight.dequantize().abs().max())
        assert largest < 0.02 if w_bit == 1 else largest == 0 and torch.equal(weight.channel_scale, before)

    def test_trunc_normal_of_torch_2_11_is_refused_with_what_to_do(self) -> None:
        """It draws uniform numbers and makes normal ones of them in place, in steps that codes cannot follow."""
        weight = nBitConv2d(32, 64, 3, w_bit=6).weight
        with torch.no_grad():
            weight.uniform_(-0.95, 0.95)
            before = weight.dequantize()
            with pytest.raises(NotImplementedError, match=r"weight\.quantize_\(.*torch\.empty"):
                weight.erfinv_()
            assert torch.equal(weight.dequantize(), before)
        weight.quantize_(nn.init.trunc_normal_(torch.empty(weight.shape), std=0.02))
        assert float(weight.dequantize().std()) == pytest.approx(0.02, rel=0.05)

    @pytest.mark.parametrize("fill", [nn.init.orthogonal_, nn.init.dirac_], ids=["orthogonal_", "dirac_"])
    def test_an_initialization_that_writes_through_views_is_right_or_refused(self, fill: Callable[..., Any]) -> None:
        weight, dense = nBitConvParameter(torch.randn(8, 6, 3, 3), w_bit=6), torch.zeros(8, 6, 3, 3)
        torch.manual_seed(1)
        fill(dense)
        torch.manual_seed(1)
        try:
            fill(weight)
        except NotImplementedError as refusal:
            message = str(refusal)
        else:
            message = None
        # a refusal says what to do instead
        assert "quantize_" in message if message else float((weight.dequantize() - dense).abs().max()) < 0.05


class Regression(nn.Module):
    """A convolution that has to become another one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nBitConv2d(2, 3, 3)
        self.x = torch.randn(8, 2, 6, 6)
        self.y = F.conv2d(self.x, torch.randn(3, 2, 3, 3) * 0.15)

    def loss(self) -> Tensor:
        return F.mse_loss(self.layer(self.x), self.y)

    def loss_now(self) -> float:
        with torch.no_grad():
            return float(self.loss())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2),
    "SGD with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "SGD with Nesterov momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam with AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.03),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=10.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


class TestOptimizers:
    @pytest.mark.parametrize("optimizer_for", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_any_first_order_optimizer_of_torch_trains_it(
        self, optimizer_for: Callable[[Any], torch.optim.Optimizer]
    ) -> None:
        task = Regression()
        optimizer = optimizer_for(task.parameters())
        codes, scale, first = task.layer.weight.codes, task.layer.weight.channel_scale.clone(), task.loss_now()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = task.loss()
            loss.backward()
            return loss

        for _ in range(40):
            optimizer.step(closure)
        assert type(task.layer.weight) is nBitConvParameter
        assert not torch.equal(task.layer.weight.codes, codes)
        assert torch.equal(task.layer.weight.channel_scale, scale)
        assert task.loss_now() < 0.65 * first
        for state in optimizer.state.values():
            assert not any(isinstance(value, nBitConvParameter) for value in state.values())

    def test_every_optimizer_of_torch_is_tried(self) -> None:
        known = {name.split()[0].strip(",") for name in OPTIMIZERS}
        there = {
            name for name, value in vars(torch.optim).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        }  # fmt: skip
        # SparseAdam takes sparse gradients only, Muon matrices only; LBFGS is refused
        assert there - known == {"Optimizer", "SparseAdam", "Muon", "LBFGS"}

    @pytest.mark.parametrize("name", ["SGD with momentum and decay", "AdamW"])
    def test_its_steps_are_those_of_a_float_weight_to_within_the_rounding(self, name: str) -> None:
        weight = nBitConvParameter(torch.randn(64, 64) * 0.1, w_bit=4, scale=0.08)
        dense = nn.Parameter(weight.level_values())
        optimizers = [OPTIMIZERS[name]([p]) for p in (weight, dense)]
        for _ in range(20):
            grad = torch.randn(64, 64) * 0.1 + 0.1
            for p, optimizer in zip((weight, dense), optimizers, strict=True):
                p.grad = grad.clone()
                optimizer.step()
        error = weight.level_values() - dense.detach()
        level = 0.08 / 16
        assert abs(float(error.mean())) < 5 * level * 20**0.5 / 64
        assert float(error.abs().max()) < 5 * level * 20**0.5

    def test_two_backward_passes_add_up(self) -> None:
        task = Regression()
        task.loss().backward()
        once = task.layer.weight.grad.clone()
        task.loss().backward()
        assert torch.allclose(task.layer.weight.grad, 2 * once)

    @pytest.mark.parametrize("mode", ["foreach", "fused"])
    @pytest.mark.parametrize(
        "kind",
        [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop],
        ids=lambda kind: kind.__name__,
    )
    def test_lists_of_tensors_are_refused_before_anything_changes(self, kind: Any, mode: str) -> None:
        if kind is torch.optim.RMSprop and mode == "fused":
            pytest.skip("RMSprop has no fused form")
        layer, first = nBitConv2d(2, 3, 3), nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = kind([first, *layer.parameters()], lr=0.1, **{mode: True})
        first.grad = torch.ones_like(first)
        layer(torch.randn(2, 2, 6, 6)).square().sum().backward()
        weights = [p.detach().clone() for p in (first, layer.bias)]
        state = copy.deepcopy(optimizer.state_dict())
        level_values = layer.weight.level_values()
        with pytest.raises(NotImplementedError, match="foreach=False and fused=False"):
            optimizer.step()
        assert torch.equal(layer.weight.level_values(), level_values)
        assert all(torch.equal(a, b) for a, b in zip((first, layer.bias), weights, strict=True))
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                old = state["state"].get(index, {}).get(name, torch.zeros(()))
                assert not isinstance(value, Tensor) or bool((value == old).all()), name

    def test_other_lists_of_tensors_are_refused_too(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3))
        with torch.no_grad(), pytest.raises(NotImplementedError, match="not supported for packed weights"):
            torch._foreach_mul_([torch.ones(2), weight], 2.0)


@pytest.mark.parametrize("channels", [3, 40])
def test_a_convolution_without_padding_in_words_trains(channels: int) -> None:
    layer, x = nBitConv2d(channels, 40, 3, padding="valid"), torch.randn(2, channels, 7, 7)
    y = layer(x)
    y.sum().backward()
    weight = layer.weight.dequantize().requires_grad_()
    expected = F.conv2d(x, weight, layer.bias)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
