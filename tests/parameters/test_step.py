"""``update``: what it moves, what every argument does, and that nothing changes where it raises."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitorch_engine import nBitConv2d, nBitConvParameter
from bitorch_engine.bits import unpack
from bitorch_engine.ops import new_moment
from bitorch_engine.optim import GaLoreProjector
from bitorch_engine.parameters.step import prepare_

aten = torch.ops.aten
WIDTHS = range(1, 9)
MEMORIES = ["fp32", "bf16", "fp16", "8bit", "channel", "channel and fp32", "no first", "none"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "8bit": torch.uint8}
update = nBitConvParameter.update


class Operators(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def moments(weight: nBitConvParameter, memory: str) -> dict[str, Tensor | None]:
    """New moments for a weight's whole gradient."""
    v = m = None
    if memory in DTYPES:
        v, m = (new_moment(weight.shape, DTYPES[memory], weight.device) for _ in range(2))
    if memory.startswith("channel"):
        v = torch.zeros(weight.channel_scale.numel())
    if memory == "channel and fp32":
        m = torch.zeros(weight.shape)
    if memory == "no first":
        v = torch.zeros(weight.shape)
    return {"exp_avg_s": v, "exp_avg_l": m}


def levels(weight: nBitConvParameter) -> Tensor:
    """Code index and residual read as one byte, in the logical shape: int64."""
    count, hidden = weight.numel(), 8 - weight.w_bit
    index = unpack(weight.packed, weight.w_bit, count).long()
    if hidden:
        index = (index << hidden) | unpack(weight.residual, hidden, count).long()
    return weight.from_rows(index.view(weight.channel_scale.numel(), -1))


def level_size(weight: nBitConvParameter) -> Tensor:
    """What one level is worth in units of the weight, broadcastable against it."""
    return weight.scale * (2 if weight.w_bit == 1 else 1) / 2 ** (8 - weight.w_bit)


def everything(weight: nBitConvParameter, *tensors: Tensor | None) -> list[Any]:
    """All bits that a step may change."""
    held = {name: copy.deepcopy(value) for name, value in vars(weight).items() if name != "_grad"}
    return [held, [None if t is None else t.clone() for t in tensors]]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def signs(shape: torch.Size) -> Tensor:
    return torch.randint(0, 2, shape) * 2.0 - 1


class TestWhatMoves:
    @pytest.mark.parametrize("memory", MEMORIES)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_a_zero_gradient_moves_nothing(self, w_bit: int, memory: str) -> None:
        weight = nBitConvParameter(torch.randn(8, 5, 3, 3), w_bit=w_bit)
        before, step, state = everything(weight)[0], torch.zeros(()), moments(weight, memory)
        for _ in range(5):
            update(weight, **state, step=step, lr=0.1, grad=torch.zeros(weight.shape))
        for name in ("packed", "residual", "channel_scale"):
            assert torch.equal(getattr(weight, name), before[name]), name

    @pytest.mark.parametrize("memory", MEMORIES)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_a_constant_gradient_moves_every_weight_by_lr_a_step(self, w_bit: int, memory: str) -> None:
        weight = nBitConvParameter(torch.randn(32, 32, 3, 3) * 0.034, w_bit=w_bit)
        grad, step, state = signs(weight.shape), torch.zeros(()), moments(weight, memory)
        start, codes, steps, lr = levels(weight), weight.dequantize(), 30, 1e-4
        for _ in range(steps):
            update(weight, **state, step=step, lr=lr, grad=grad)
        expected = steps * lr
        margin = (3 * expected / level_size(weight)).expand(weight.shape)  # so that the range does not stop them
        free = (start > margin) & (start < 255 - margin)
        moved = ((levels(weight) - start) * level_size(weight) * -grad)[free]
        assert float(free.float().mean()) > 0.5
        assert abs(float(moved.mean()) / expected - 1) < 0.02
        forward = (weight.dequantize() - codes) * -grad
        assert 0.5 < float(forward.mean()) / expected < 1.2

    @pytest.mark.parametrize("start", ["a new layer", "integer codes", "no residual left"])
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_the_weight_that_forward_sees_follows_from_the_first_steps(self, w_bit: int, start: str) -> None:
        weight = nBitConvParameter(torch.randn(32, 32, 3, 3) * 0.034, w_bit=w_bit)
        if start == "a new layer":
            weight = nBitConv2d(32, 32, 3, w_bit=w_bit).weight
        if start == "integer codes":
            weight = nBitConvParameter(weight.codes, w_bit=w_bit, scale=weight.channel_scale)
        if start == "no residual left":
            weight.drop_residual_()
        grad, step, state = signs(weight.shape), torch.zeros(()), moments(weight, "fp32")
        before, steps, lr = weight.dequantize(), 30, 1e-4
        for _ in range(steps):
            update(weight, **state, step=step, lr=lr, grad=grad)
        ratio = float(((weight.dequantize() - before) * -grad).mean()) / (steps * lr)
        assert 0.5 < ratio < 1.2

    @pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
    @pytest.mark.parametrize("w_bit", [1, 4, 8])
    def test_steps_of_two_ten_thousandths_of_a_level_are_not_lost(self, w_bit: int, sign: int) -> None:
        # below this an optimizer at a small learning rate would stand still or drift
        count, steps, size = 1 << 19, 8, 2e-4
        codes = torch.ones(64, count // 64, dtype=torch.int8)
        weight = nBitConvParameter(codes, w_bit=w_bit)
        weight.require_residual_()
        start = levels(weight)
        # levels that cannot move any farther stay out of the count
        free = ((start > 8) & (start < 247)).sum()
        lr = size * float(level_size(weight).max())
        for _ in range(steps):
            update(weight, lr=lr, grad=torch.full(weight.shape, -float(sign)))
        expected = float(free) * steps * size
        moved = ((levels(weight) - start) * sign)[(start > 8) & (start < 247)].double()
        assert abs(float(moved.sum()) - expected) < 4.5 * expected**0.5
        assert float(moved.min()) >= 0

    @pytest.mark.parametrize(("w_bit", "memory"), [*((1, memory) for memory in MEMORIES), (4, "fp32"), (8, "8bit")])
    def test_200_steps_follow_adam_in_float64(self, w_bit: int, memory: str) -> None:
        lr, betas, eps, steps = 1e-3, (0.9, 0.99), 1e-6, 200
        # a grid that reaches to +- 0.6, so that no weight comes to its end
        scale = 0.3 if w_bit == 1 else 1.2 / 2**w_bit
        weight = nBitConvParameter(torch.randn(16, 16, 3, 3) * 0.05, w_bit=w_bit, scale=scale)
        assert torch.allclose(level_size(weight), torch.tensor(1.2 / 256))
        state, step = moments(weight, memory), torch.zeros(())
        start = levels(weight)
        true = torch.zeros(weight.shape, dtype=torch.float64)
        m = v = torch.zeros(weight.shape, dtype=torch.float64)
        drift = torch.randn(weight.shape)
        for t in range(1, steps + 1):
            grad = 0.3 * (drift + torch.randn(weight.shape))
            update(weight, **state, step=step, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, grad=grad)
            g = grad.double()
            square = g.square().mean((1, 2, 3), keepdim=True) if memory.startswith("channel") else g.square()
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * square
            direction = g if state["exp_avg_l"] is None else m / (1 - betas[0] ** t)
            if state["exp_avg_s"] is not None:
                direction = direction / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            true -= lr * direction
        size = 1.2 / 256
        error = (levels(weight) - start) * size - true
        assert int(step) == steps
        assert int(levels(weight).min()) > 0 and int(levels(weight).max()) < 255
        noise = (steps / 4) ** 0.5 * size  # the most that rounding to a level adds up to
        assert float(error.square().mean().sqrt()) < noise
        assert abs(float(error.mean())) < 4 * noise / error.numel() ** 0.5
        slope = float((error * true).mean() / true.square().mean())
        assert abs(slope) < 0.02

    @pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4, 1e-6], ids=lambda scale: f"gradients={scale:g}")
    @pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "none"])
    def test_small_gradients_train_as_well_as_large_ones(self, memory: str, scale: float) -> None:
        weight = nBitConvParameter(torch.randn(32, 32, 3, 3) * 0.034, w_bit=4)
        grad, step, state = signs(weight.shape) * scale, torch.zeros(()), moments(weight, memory)
        start, steps, lr = levels(weight), 30, 1e-4
        for _ in range(steps):
            noisy = grad * (0.75 + 0.5 * torch.rand(weight.shape))
            update(weight, **state, step=step, lr=lr, eps=1e-6 * scale, grad=noisy)
        free = (start > 30) & (start < 225)
        moved = ((levels(weight) - start) * level_size(weight) * -grad.sign())[free]
        assert 0.96 < float(moved.mean()) / (steps * lr) < 1.03

    @pytest.mark.parametrize("growth", [1e2, 1e4], ids=lambda growth: f"growth={growth:g}")
    @pytest.mark.parametrize("memory", ["fp32", "bf16", "fp16", "8bit", "channel"])
    def test_a_gradient_that_grows_after_the_first_step_makes_no_larger_steps(self, memory: str, growth: float) -> None:
        # so it is behind a normalization layer whose gain starts at zero: the second step has the first real gradient
        weight = nBitConvParameter(torch.randn(16, 16, 3, 3) * 0.034, w_bit=4)
        grad, step, state = signs(weight.shape), torch.zeros(()), moments(weight, memory)
        update(weight, **state, step=step, lr=1e-4, eps=1e-12, grad=grad / growth)
        for _ in range(60):
            update(weight, **state, step=step, lr=1e-4, eps=1e-12, grad=grad)
        start = levels(weight)
        for _ in range(20):
            update(weight, **state, step=step, lr=1e-4, eps=1e-12, grad=grad)
        free = (start > 30) & (start < 225)
        moved = ((levels(weight) - start) * level_size(weight) * -grad)[free]
        assert 0.8 < float(moved.mean()) / (20 * 1e-4) < 1.1

    def test_weights_stop_at_the_ends_of_their_range(self) -> None:
        for w_bit in WIDTHS:
            weight = nBitConvParameter(torch.randn(4, 4, 3, 3), w_bit=w_bit)
            update(weight, lr=1e6, grad=-torch.ones(weight.shape))
            assert bool((weight.codes == weight.format.high).all())
            update(weight, lr=1e6, grad=torch.ones(weight.shape))
            assert bool((weight.codes == weight.format.low).all())

    def test_noise_differs_between_steps_and_between_layers(self) -> None:
        first, second = (nBitConvParameter(torch.randn(64, 64, 1, 1), w_bit=8) for _ in range(2))
        moves = []
        for weight in (first, first, second):
            start = levels(weight)
            update(weight, lr=0.5 * float(level_size(weight).min()), grad=torch.ones(weight.shape))
            moves.append((levels(weight) - start).view(-1))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert float((moves[a] == moves[b]).float().mean()) < 0.75

    def test_equal_weights_and_gradients_step_equally_whatever_the_generator(self) -> None:
        weights = [nBitConvParameter(torch.linspace(-1, 1, 360).view(4, 10, 3, 3)) for _ in range(2)]
        for seed, weight in enumerate(weights):
            torch.manual_seed(seed)
            state = moments(weight, "8bit")
            for t in range(5):
                update(weight, **state, lr=1e-3, grad=torch.linspace(-1, 1 + t, 360).view(weight.shape))
        assert torch.equal(levels(weights[0]), levels(weights[1]))

    def test_a_step_draws_nothing_from_torchs_generator(self) -> None:
        weight = nBitConvParameter(torch.randn(8, 8, 3, 3))
        generator = torch.get_rng_state()
        update(weight, **moments(weight, "8bit"), grad=torch.ones(weight.shape))
        assert torch.equal(generator, torch.get_rng_state())


class TestArguments:
    def whole(self, count: int = 1) -> nBitConvParameter:
        """An 8-bit weight of zeros with scale 1: a move by whole units is exact."""
        return nBitConvParameter(torch.zeros(count, 3, 1, 1, dtype=torch.int8))

    def test_the_signature_is_the_documented_one(self) -> None:
        weight, v, m, step = self.whole(), torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.zeros(1)
        grad = torch.ones(weight.shape)
        result = update(weight, v, m, step, 1e-4, 0.0, 0.99, 0.9999, 1e-6, torch.float16, None, None, grad)
        assert result is None and int(step) == 1

    @pytest.mark.parametrize("lr", [1.0, 2.0, 7.0])
    def test_lr_is_in_units_of_the_weight(self, lr: float) -> None:
        weight = self.whole()
        update(weight, lr=lr, grad=torch.tensor([1.0, 0.0, -2.0]).view(weight.shape))
        assert weight.codes.view(-1).tolist() == [-lr, 0, 2 * lr]

    def test_lr_may_be_a_tensor(self) -> None:
        weight = self.whole()
        update(weight, lr=torch.tensor(3.0), grad=torch.ones(weight.shape))  # type: ignore[arg-type]
        assert weight.codes.view(-1).tolist() == [-3, -3, -3]

    def test_weight_decay_multiplies_the_scale_and_leaves_the_codes(self) -> None:
        weight = nBitConvParameter(torch.randn(6, 4, 3, 3), w_bit=3)
        before, step = everything(weight)[0], torch.zeros(())
        for _ in range(3):
            update(
                weight, **moments(weight, "fp32"), step=step, lr=0.01, weight_decay=0.5, grad=torch.zeros(weight.shape)
            )
        assert torch.allclose(weight.channel_scale, before["channel_scale"] * (1 - 0.01 * 0.5) ** 3, rtol=1e-6)
        assert torch.equal(weight.packed, before["packed"]) and torch.equal(weight.residual, before["residual"])

    def test_weight_decay_ends_where_the_scale_is_down_to_lr(self) -> None:
        weight = nBitConvParameter(torch.ones(2, 3, 1, 1, dtype=torch.int8), scale=torch.tensor([1.0, 0.003]))
        for _ in range(200):
            update(weight, lr=0.01, weight_decay=5.0, grad=torch.zeros(weight.shape))
        assert weight.channel_scale.tolist() == pytest.approx([0.01, 0.003])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_moments_are_what_beta1_and_beta2_say(self, dtype: torch.dtype) -> None:
        for transposed in (False, True):
            weight = nBitConvParameter(torch.randn(4, 6, 3, 3), transposed=transposed, groups=2 if transposed else 1)
            v, m = torch.zeros(4, 6, 3, 3, dtype=dtype), torch.zeros(4, 6, 3, 3, dtype=dtype)
            v_true = m_true = torch.zeros(4, 6, 3, 3, dtype=torch.float64)
            for _ in range(3):
                grad = torch.randn(4, 6, 3, 3, dtype=dtype)
                update(weight, v, m, beta1=0.7, beta2=0.8, dtype=dtype, grad=grad)
                m_true = 0.7 * m_true + 0.3 * grad.double()
                v_true = 0.8 * v_true + 0.2 * grad.double().square()
            close = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-14}
            assert torch.allclose(m.double(), m_true, **close)
            assert torch.allclose(v.double(), v_true, **close)

    @pytest.mark.parametrize("memory", MEMORIES)
    @pytest.mark.parametrize("groups", [1, 2], ids=["one group", "two groups"])
    def test_a_transposed_weight_steps_every_weight_against_its_own_gradient(self, groups: int, memory: str) -> None:
        weight = nBitConvParameter(torch.randn(8, 6, 3, 3) * 0.1, w_bit=8, transposed=True, groups=groups)
        start, state, step, lr = levels(weight), moments(weight, memory), torch.zeros(()), 0.03
        grad = signs(weight.shape)
        for _ in range(3):
            update(weight, **state, step=step, lr=lr, grad=grad)
        moved = (levels(weight) - start) * level_size(weight) * -grad
        free = (start > 100) & (start < 155)
        assert int(free.sum()) > 50
        assert float((moved - 3 * lr)[free].abs().max()) < 4 * float(level_size(weight).max())

    def test_the_second_moment_alone_is_kept_in_the_order_of_a_transposed_gradient(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 6, 3, 3), transposed=True)
        v, grad = torch.zeros(weight.shape), torch.randn(weight.shape)
        update(weight, v, beta2=0.5, grad=grad)
        assert torch.allclose(v, 0.5 * grad.square())

    def test_eps_is_added_to_the_root_of_the_second_moment(self) -> None:
        weight, eps = self.whole(), 0.25
        grad = torch.tensor([4.0, 0.25, -0.75]).view(weight.shape)
        state = moments(weight, "fp32")
        # lr so that every move is a whole number: 4 / 4.25, 0.25 / 0.5 and 0.75 / 1 of it
        update(weight, **state, step=torch.zeros(()), lr=68.0, eps=eps, grad=grad)
        assert weight.codes.view(-1).tolist() == pytest.approx([-64, -34, 51], abs=1)

    @pytest.mark.parametrize(
        ("correct_bias", "counted", "corrected"),
        [(True, True, True), (None, True, True), (False, True, False), (None, False, False), (False, False, False)],
        ids=["True", "None with a step", "False", "None without a step", "False without a step"],
    )
    def test_correct_bias(self, correct_bias: bool | None, counted: bool, corrected: bool) -> None:
        weight, step = self.whole(), torch.zeros(()) if counted else None
        state = moments(weight, "fp32")
        settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-12, "correct_bias": correct_bias, "step": step}
        update(weight, **state, **settings, lr=60.0, grad=torch.ones(weight.shape))
        first = 60 if corrected else 60 * 0.1 / 0.01**0.5
        assert weight.codes.view(-1).tolist() == pytest.approx([-first] * 3, abs=1)
        update(weight, **state, **settings, lr=60.0, grad=torch.ones(weight.shape))
        second = 60 if corrected else 60 * 0.19 / 0.0199**0.5
        assert weight.codes.view(-1).tolist() == pytest.approx([max(-first - second, -128)] * 3, abs=1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(), (1,)], ids=["a number", "one element"])
    def test_step_is_counted_up_by_one(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        weight, step = self.whole(), torch.full(shape, 41, dtype=dtype)
        update(weight, step=step, grad=torch.ones(weight.shape))
        assert int(step) == 42 and step.dtype == dtype and step.shape == shape

    def test_the_gradient_is_the_weights_own_unless_one_is_given(self) -> None:
        own, given = (nBitConvParameter(torch.linspace(-1, 1, 72).view(2, 4, 3, 3)) for _ in range(2))
        grad = torch.randn(own.shape)
        own.grad, given.grad = grad.clone(), torch.full(given.shape, float("nan"))
        update(own, **moments(own, "8bit"), lr=0.01)
        update(given, **moments(given, "8bit"), lr=0.01, grad=grad)
        assert torch.equal(levels(own), levels(given))
        assert torch.equal(own.grad, grad) and bool(given.grad.isnan().all())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_the_gradient_may_have_any_float_dtype(self, dtype: torch.dtype) -> None:
        weight = self.whole()
        update(weight, lr=2.0, grad=torch.tensor([1.0, 0.0, -2.0]).view(weight.shape).to(dtype))
        assert weight.codes.view(-1).tolist() == [-2, 0, 4]

    def test_the_gradient_may_have_any_memory_format(self) -> None:
        dense, strided = (nBitConvParameter(torch.linspace(-1, 1, 216).view(6, 4, 3, 3)) for _ in range(2))
        grad = torch.randn(dense.shape)
        update(dense, **moments(dense, "fp32"), lr=0.01, grad=grad)
        update(strided, **moments(strided, "fp32"), lr=0.01, grad=grad.to(memory_format=torch.channels_last))
        assert torch.equal(levels(dense), levels(strided))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_no_gradient_is_copied_to_ask_whether_its_steps_can_be_prepared(self, device: str) -> None:
        weight = nBitConvParameter(torch.randn(4, 6, 3, 3))
        weight.require_residual_()
        grad = torch.empty(4, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
        with Operators() as seen:
            prepare_(weight, grad, None, None, torch.float32)
        assert not {aten.clone.default, aten.copy_.default, aten._to_copy.default} & set(seen.operators)

    def test_dtype_float64_computes_in_float64(self) -> None:
        # in float32, 1 - 1e-9 is 1, and the moment would stay at 0
        weight, m = self.whole(), torch.zeros(1, 3, 1, 1, dtype=torch.float64)
        grad = torch.tensor([1.0, 3.0, 1 / 3], dtype=torch.float64).view(weight.shape)
        update(weight, None, m, beta1=0.5, dtype=torch.float64, grad=grad)
        assert torch.equal(m, grad * 0.5)

    def test_learned_scales_follow_their_gradient_and_the_codes_stay(self) -> None:
        weight = nBitConvParameter(torch.randn(3, 4, 3, 3), w_bit=3, learn_scale=True)
        before, step, lr = weight.channel_scale.clone(), torch.zeros(()), 1e-3
        # the gradient of a channel's scale is the sum of gradient * code: positive, negative, none
        grad = weight.codes * torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1)
        for _ in range(20):
            update(weight, **moments(weight, "fp32"), step=step, lr=lr, grad=grad)
        ratio = weight.channel_scale / before
        assert torch.allclose(ratio, torch.tensor([(1 - lr) ** 20, (1 + lr) ** 20, 1.0]), rtol=1e-4)


class TestScalesThatAreNotPositive:
    """What folding a BatchNorm with a negative weight leaves."""

    @pytest.mark.parametrize("memory", ["fp32", "channel", "none"])
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_a_step_moves_the_weight_against_its_gradient(self, w_bit: int, memory: str) -> None:
        weight = nBitConvParameter(torch.randn(32, 32, 3, 3) * 0.034, w_bit=w_bit)
        weight.multiply_channels_(torch.tensor([-1.0, 1.0, -0.5, 0.0]).repeat(8))
        grad, step, state = signs(weight.shape), torch.zeros(()), moments(weight, memory)
        before, steps, lr = weight.dequantize(), 30, 1e-4
        for _ in range(steps):
            update(weight, **state, step=step, lr=lr, grad=grad)
        forward = ((weight.dequantize() - before) * -grad).view(8, 4, -1).mean((0, 2)) / (steps * lr)
        assert bool(((forward[:3] > 0.4) & (forward[:3] < 1.3)).all())
        assert forward[3] == 0

    def test_weight_decay_makes_it_smaller_down_to_lr(self) -> None:
        weight = nBitConvParameter(torch.ones(4, 3, 1, 1, dtype=torch.int8))
        weight.multiply_channels_(torch.tensor([-1.0, -0.015, -0.003, 0.0]))
        update(weight, lr=0.01, weight_decay=5.0, grad=torch.zeros(weight.shape))
        assert weight.channel_scale.tolist() == pytest.approx([-0.95, -0.01425, -0.003, 0.0])

    def test_a_learned_one_follows_its_gradient(self) -> None:
        weight = nBitConvParameter(torch.randn(3, 4, 3, 3), w_bit=3, learn_scale=True)
        weight.multiply_channels_(torch.tensor([-1.0, -1.0, 0.0]))
        before = weight.channel_scale.clone()
        grad = weight.codes * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
        update(weight, lr=1e-3, grad=grad)
        assert torch.allclose(weight.channel_scale, before * torch.tensor([1.001, 0.999, 1.0]), rtol=1e-6)


class HalfProjector:
    """Keeps the even columns of the gradient's rows."""

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def project(self, grad: Tensor, iter: int) -> Tensor:
        self.iterations.append(iter)
        return grad.flatten(1)[:, ::2].contiguous()

    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        return torch.stack([low_rank_grad, torch.zeros_like(low_rank_grad)], 2).flatten(1)


SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ((6, 4, 4), {}),
    "conv2d": ((6, 4, 3, 3), {}),
    "conv3d": ((6, 2, 3, 3, 3), {}),
    "transposed": ((4, 6, 3, 3), {"transposed": True}),
    "transposed, two groups": ((4, 3, 3, 3), {"transposed": True, "groups": 2}),
}


class TestProjector:
    @pytest.mark.parametrize("memory", ["fp32", "bf16", "fp16", "8bit"])
    @pytest.mark.parametrize(("shape", "layout"), SHAPES.values(), ids=SHAPES)
    def test_only_what_is_projected_back_moves(
        self, shape: tuple[int, ...], layout: dict[str, Any], memory: str
    ) -> None:
        weight = nBitConvParameter(torch.randn(shape) * 0.01, w_bit=8, scale=0.01, **layout)
        projector, grad = HalfProjector(), signs(shape)
        low = projector.project(weight.to_rows(grad), 0)
        v, m = (new_moment(low.shape, DTYPES[memory], torch.device("cpu")) for _ in range(2))
        start = weight.to_rows(levels(weight))
        update(weight, v, m, torch.zeros(()), lr=0.1, projector=projector, grad=low)
        moved = weight.to_rows(levels(weight)) - start
        even, odd = moved[:, ::2], moved[:, 1::2]
        assert not odd.any()
        assert torch.allclose(even * 0.01, -0.1 * weight.to_rows(grad)[:, ::2], atol=0.0101)

    @pytest.mark.parametrize(("shape", "layout"), SHAPES.values(), ids=SHAPES)
    def test_without_grad_the_weights_own_is_projected(self, shape: tuple[int, ...], layout: dict[str, Any]) -> None:
        weights = [
            nBitConvParameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape), **layout) for _ in "ab"
        ]
        grad, projector = torch.randn(shape), HalfProjector()
        low = projector.project(weights[0].to_rows(grad), 0)
        for t in range(2):
            weights[1].grad = grad
            for weight, given in zip(weights, (low, None), strict=True):
                v, m = torch.zeros(low.shape), torch.zeros(low.shape)
                update(weight, v, m, torch.tensor(float(t)), lr=0.01, projector=projector, grad=given)
        assert torch.equal(levels(weights[0]), levels(weights[1]))
        assert projector.iterations == [0, 0, 1]  # timed by the step before it is counted up

    @pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
    @pytest.mark.parametrize(("shape", "layout"), SHAPES.values(), ids=SHAPES)
    def test_galore_keeps_a_gradient_of_its_rank(
        self, shape: tuple[int, ...], layout: dict[str, Any], proj_type: str
    ) -> None:
        weight = nBitConvParameter(torch.zeros(shape), w_bit=8, scale=0.01, **layout)
        rows, columns = weight.to_rows(weight.dequantize()).shape
        low_rank = signs(torch.Size((rows, 1))) @ signs(torch.Size((1, columns)))
        weight.grad = weight.from_rows(low_rank.contiguous())
        update(weight, step=torch.zeros(()), lr=0.1, projector=GaLoreProjector(1, proj_type=proj_type))
        # without moments the direction is the gradient itself, and it lies in the projector's space
        assert torch.allclose(weight.dequantize(), -0.1 * weight.grad, atol=0.0101)

    def test_galore_takes_the_gradient_of_a_transposed_weight_in_its_own_shape(self) -> None:
        weight = nBitConvParameter(torch.zeros(4, 6, 3, 3), w_bit=8, scale=0.01, transposed=True)
        grad, projector = torch.zeros(weight.shape), GaLoreProjector(4)
        grad[0, 3] = 1.0
        update(weight, lr=0.1, projector=projector, grad=projector.project(grad, 0))
        assert torch.allclose(weight.dequantize(), -0.1 * grad, atol=0.0101)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "a gradient of another shape": (
        lambda: {"grad": torch.ones(2, 3, 3, 2)},
        ValueError,
        r"grad must have the weight's shape \(2, 3, 3, 3\), got \(2, 3, 3, 2\)",
    ),
    "an integer gradient": (
        lambda: {"grad": torch.ones(2, 3, 3, 3, dtype=torch.int8)},
        TypeError,
        "grad must be a dense floating point tensor, got torch.int8",
    ),
    "a gradient that is no tensor": (lambda: {"grad": 1.0}, TypeError, "grad must be a dense floating"),
    "a gradient on another device": (
        lambda: {"grad": torch.ones(2, 3, 3, 3, device="meta")},
        ValueError,
        "grad must be on the weight's device cpu, got meta",
    ),
    "a first moment of another shape": (
        lambda: {"exp_avg_l": torch.zeros(2, 3, 3, 2)},
        ValueError,
        r"exp_avg_l must have the gradient's shape \(2, 3, 3, 3\).*got \(2, 3, 3, 2\)",
    ),
    "a second moment of another shape": (
        lambda: {"exp_avg_s": torch.zeros(3)},
        ValueError,
        r"exp_avg_s must have the gradient's shape \(2, 3, 3, 3\).*got \(3,\)",
    ),
    "8-bit moments of another size": (
        lambda: {"exp_avg_s": new_moment((500,), torch.uint8, torch.device("cpu"))},
        ValueError,
        "exp_avg_s must have the gradient's shape",
    ),
    "an integer moment": (
        lambda: {"exp_avg_l": torch.zeros(2, 3, 3, 3, dtype=torch.int8)},
        TypeError,
        "exp_avg_l must be float.*got torch.int8",
    ),
    "a moment on another device": (
        lambda: {"exp_avg_l": torch.zeros(2, 3, 3, 3, device="meta")},
        ValueError,
        "exp_avg_l must be on the gradient's device cpu, got meta",
    ),
    "a moment that is not contiguous": (
        lambda: {"exp_avg_s": torch.zeros(2, 3, 3, 3).transpose(2, 3)},
        ValueError,
        "exp_avg_s must be contiguous",
    ),
    "a negative lr": (lambda: {"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1"),
    "an infinite lr": (lambda: {"lr": float("inf")}, ValueError, "lr must be finite"),
    "a NaN weight decay": (lambda: {"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
    "a negative eps": (lambda: {"eps": -1e-8}, ValueError, "eps must be finite and at least 0"),
    "beta1 of one": (lambda: {"beta1": 1.0}, ValueError, "beta1 must be at least 0 and below 1, got 1.0"),
    "a negative beta2": (lambda: {"beta2": -0.1}, ValueError, "beta2 must be at least 0 and below 1, got -0.1"),
    "an integer dtype": (lambda: {"dtype": torch.int8}, TypeError, "dtype must be a floating point type"),
    "a step of two elements": (lambda: {"step": torch.zeros(2)}, TypeError, "step must be a tensor with one"),
    "a step that is no tensor": (lambda: {"step": 3}, TypeError, "step must be a tensor with one element"),
    "bias correction without a step": (
        lambda: {"correct_bias": True, "step": None},
        ValueError,
        "correct_bias=True needs step",
    ),
    "a projected gradient of another shape": (
        lambda: {"projector": HalfProjector(), "grad": torch.ones(2, 5), "exp_avg_s": None, "exp_avg_l": None},
        ValueError,
        "the projector must give back shape",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25], ids=str)
    @pytest.mark.parametrize("memory", MEMORIES)
    def test_a_gradient_that_is_not_finite_changes_not_one_bit(self, memory: str, value: float) -> None:
        for residual in (True, False):
            weight = nBitConvParameter(torch.randn(8, 4, 3, 3), w_bit=3, learn_scale=True)
            state, step = moments(weight, memory), torch.zeros(())
            update(weight, **state, step=step, lr=0.01, grad=torch.randn(weight.shape))
            if not residual:
                weight.drop_residual_()
            grad = torch.randn(weight.shape)
            grad[-1, 2, 1, 0] = value
            before = everything(weight, *state.values(), step)
            with pytest.raises(
                ValueError, match="the gradient has NaN or Inf entries.*no weight and no state was changed"
            ):
                update(weight, **state, step=step, lr=0.01, weight_decay=0.1, grad=grad)
            weight.grad = grad
            with pytest.raises(ValueError, match="the gradient has NaN or Inf entries"):
                update(weight, **state, step=step, lr=0.01)
            assert same(before, everything(weight, *state.values(), step))

    def test_a_full_gradient_beside_a_projected_one_is_checked_too(self) -> None:
        weight, projector = nBitConvParameter(torch.randn(8, 4, 3, 3), learn_scale=True), HalfProjector()
        low, step = torch.randn(8, 18), torch.zeros(())
        weight.grad = torch.full(weight.shape, float("nan"))
        before = everything(weight, step)
        with pytest.raises(ValueError, match="the gradient has NaN or Inf entries"):
            update(weight, step=step, projector=projector, grad=low)
        assert same(before, everything(weight, step))

    @pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
    def test_what_does_not_fit_is_refused_and_changes_nothing(
        self, change: Callable[[], dict[str, Any]], error: type[Exception], message: str
    ) -> None:
        weight = nBitConvParameter(torch.randn(2, 3, 3, 3).mul(10).round().clamp(-8, 7).to(torch.int8), w_bit=4)
        settings: dict[str, Any] = moments(weight, "fp32") | {"grad": torch.ones(weight.shape), "step": torch.zeros(())}
        settings |= change()
        tensors = [value for value in settings.values() if isinstance(value, Tensor) and value.device.type != "meta"]
        before = everything(weight, *tensors)
        with pytest.raises(error, match=message):
            update(weight, **settings)
        assert same(before, everything(weight, *tensors))

    def test_no_gradient_at_all_is_refused(self) -> None:
        with pytest.raises(ValueError, match="there is no gradient: pass grad, or call backward"):
            update(nBitConvParameter(torch.randn(2, 3)))

    def test_a_learned_scale_needs_the_full_gradient(self) -> None:
        weight = nBitConvParameter(torch.randn(8, 4, 3, 3), learn_scale=True)
        with pytest.raises(ValueError, match="a learned scale needs the full gradient besides the projected one"):
            update(weight, projector=HalfProjector(), grad=torch.randn(8, 18))

    def test_a_weight_without_data_is_refused(self) -> None:
        weight = nBitConvParameter(torch.randn(2, 3, 3, 3)).to("meta")
        with pytest.raises((ValueError, RuntimeError), match="meta"):
            update(weight, grad=torch.ones(2, 3, 3, 3, device="meta"))
