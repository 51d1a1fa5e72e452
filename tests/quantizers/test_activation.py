"""Activation quantization against its formula written out, and its gradients against learned step size quantization."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from bitorch_engine.ops.reference.activation import activation_codes, activation_index, straight_through
from bitorch_engine.quantizers.activation import ActivationQuantizer, reaching_scale

WIDTHS = range(1, 9)


def lows(bits: int) -> list[float]:
    """The lowest codes that there are: of signed and of unsigned activations."""
    return [-1.0] if bits == 1 else [-(2.0 ** (bits - 1)), 0.0]


CASES = [(bits, low) for bits in WIDTHS for low in lows(bits)]
IDS = [f"{bits} bits, {'unsigned' if low == 0 else 'signed'}" for bits, low in CASES]


def fake_quantize(x: Tensor, scale: Tensor, bits: int, low: float) -> Tensor:
    """The values that codes stand for, one element after the other."""
    high = low + 2**bits - 1
    values = []
    for value in x.double().view(-1).tolist():
        code = 1.0 if value >= 0 else -1.0
        if bits > 1:
            code = float(
                min(max(round(value / float(scale)), low), high)
            )  # Python rounds halves to even, as torch does
        values.append(code * float(scale))
    return torch.tensor(values, dtype=torch.float64).view(x.shape)


def exact_lsq(x: Tensor, scale: Tensor, bits: int, low: float) -> Tensor:
    """d(quantized x) / d(scale), Esser et al. 2020, equation 3; at 1 bit the sign."""
    if bits == 1:
        return torch.where(x >= 0, 1.0, -1.0)
    ratio, high = x / scale, low + 2**bits - 1
    return torch.where(ratio < low, low, torch.where(ratio > high, high, ratio.round() - ratio))


def activations(low: float, *shape: int) -> Tensor:
    x = torch.randn(shape)
    return x.relu() if low == 0 else x


@pytest.mark.parametrize(("bits", "low"), CASES, ids=IDS)
def test_codes_are_rounded_and_clamped(bits: int, low: float) -> None:
    scale = torch.tensor(0.25)
    x = torch.cat([activations(low, 200) * 2 ** (bits - 1) * 0.2, torch.tensor([0.0, 1e9, -1e9, 0.125, 0.375, -0.125])])
    index, beyond = activation_index(x, scale, torch.tensor(low), bits)
    assert index.dtype == beyond.dtype == torch.uint8 and int(index.max()) <= 2**bits - 1
    codes = activation_codes(index, torch.tensor(low), bits)
    assert torch.equal((codes * scale).double(), fake_quantize(x, scale, bits, low))
    assert int(beyond.max()) <= 1


@pytest.mark.parametrize(("bits", "low"), CASES, ids=IDS)
def test_what_is_kept_tells_which_elements_were_clipped(bits: int, low: float) -> None:
    scale = torch.tensor(0.25)
    x = torch.randn(1000) * 2 ** (bits - 1) * 0.2
    x = torch.cat([x, (low + torch.arange(2**bits) * (2 if bits == 1 else 1)) * 0.25])  # the codes themselves are not
    index, beyond = activation_index(x, scale, torch.tensor(low), bits)
    grad_x, _ = straight_through(torch.ones_like(x), index, beyond, torch.tensor(low), bits)
    ratio = x / scale
    inside = (ratio >= low) & (ratio <= low + (2**bits - 1) * (2 if bits == 1 else 1))
    assert torch.equal(grad_x, inside.float())


@pytest.mark.parametrize(("bits", "low"), CASES, ids=IDS)
def test_the_scales_gradient_correlates_with_that_of_lsq(bits: int, low: float) -> None:
    """Of an element that is not clipped only the sign of its rounding error is kept, and nothing in the lowest code."""
    scale = torch.tensor({1: 0.8, 2: 1.0, 3: 0.6, 4: 0.35}.get(bits, 4.0 / 2**bits))
    high = low + (2**bits - 1) * (2 if bits == 1 else 1)
    pairs = []
    for _ in range(100):
        x, grad = activations(low, 4, 300), torch.randn(4, 300)
        index, beyond = activation_index(x, scale, torch.tensor(low), bits)
        _, ours = straight_through(grad, index, beyond, torch.tensor(low), bits)
        pairs.append((float(ours), float((grad * exact_lsq(x, scale, bits, low)).sum() / (300 * high) ** 0.5)))
    ours, exact = torch.tensor(pairs).T
    assert float((ours * exact).sum() / (ours.norm() * exact.norm())) > 0.6
    assert 0.5 < float(ours.norm() / exact.norm()) < 1.2


@pytest.mark.parametrize("factor", [1 / 3, 3.0], ids=["too small", "too large"])
@pytest.mark.parametrize(("bits", "low"), CASES, ids=IDS)
def test_following_the_gradient_brings_a_bad_scale_to_one_that_fits(bits: int, low: float, factor: float) -> None:
    x = activations(low, 4, 500)

    def error(scale: float) -> Tensor:
        index, _ = activation_index(x, torch.tensor(scale), torch.tensor(low), bits)
        return activation_codes(index, torch.tensor(low), bits) * scale - x

    candidates = [2 ** (k / 8 - 9) for k in range(88)]
    best = min(candidates, key=lambda scale: float(error(scale).square().mean()))
    scale = best * factor
    start = float(error(scale).square().mean())
    for step in range(150):
        index, beyond = activation_index(x, torch.tensor(scale), torch.tensor(low), bits)
        _, grad = straight_through(error(scale), index, beyond, torch.tensor(low), bits)
        scale *= 2 ** (-0.05 * (1 - step / 150) * float(grad.sign()))
    end = float(error(scale).square().mean())
    assert end < 0.7 * start
    assert end < 2.5 * float(error(best).square().mean())


def test_at_one_bit_and_where_all_is_clipped_the_scales_gradient_is_exact() -> None:
    x, grad = torch.randn(3, 50), torch.randn(3, 50)
    index, beyond = activation_index(x, torch.tensor(0.7), torch.tensor(-1.0), 1)
    _, ours = straight_through(grad, index, beyond, torch.tensor(-1.0), 1)
    assert torch.allclose(ours, (grad * torch.where(x >= 0, 1.0, -1.0)).sum() / 50**0.5)
    x = 100 + x.abs()
    index, beyond = activation_index(x, torch.tensor(0.7), torch.tensor(0.0), 3)
    _, ours = straight_through(grad, index, beyond, torch.tensor(0.0), 3)
    assert torch.allclose(ours, (grad * 7).sum() / (50 * 7) ** 0.5)


def test_exact_zeros_of_a_relu_do_not_pull_at_the_scale() -> None:
    x = torch.zeros(2, 100)
    index, beyond = activation_index(x, torch.tensor(0.5), torch.tensor(0.0), 4)
    grad_x, grad_scale = straight_through(torch.ones(2, 100), index, beyond, torch.tensor(0.0), 4)
    assert float(grad_scale) == 0 and bool((grad_x == 1).all())


@pytest.mark.parametrize(("bits", "low"), CASES, ids=IDS)
def test_nan_becomes_a_code_and_infinities_the_outermost(bits: int, low: float) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    index, _ = activation_index(x, torch.tensor(0.5), torch.tensor(low), bits)
    codes = activation_codes(index, torch.tensor(low), bits).tolist()
    assert codes == [1.0 if bits == 1 else 0.0, low + (2**bits - 1) * (2 if bits == 1 else 1), low]


class TestQuantizer:
    def prepared(self, bits: int, x: Tensor) -> ActivationQuantizer:
        quantizer = ActivationQuantizer(bits)
        quantizer.prepare_(x)
        return quantizer

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_the_first_batch_sets_a_scale_that_fits(self, bits: int) -> None:
        for factor in (1e-4, 1.0, 1e4):
            for low in lows(bits):
                x = activations(low, 5000) * factor
                quantizer = self.prepared(bits, x)
                assert float(quantizer.low) == low
                scale = float(quantizer.scale.detach())

                def error(s: float, x: Tensor = x, low: float = low) -> float:
                    ratio = x / s
                    code = ratio.sign() if bits == 1 else ratio.round().clamp(low, low + 2**bits - 1)
                    return float((code * s - x).square().mean())

                best = min(error(scale * 2 ** (k / 4)) for k in range(-12, 13))
                # LSQ starts from 2 mean(|x|) / sqrt(high), which is no optimum, but no disaster either
                assert error(scale) < 13 * best
                assert error(scale) < 0.6 * float(x.square().mean())

    def test_eight_bits_reach_to_the_largest_value(self) -> None:
        x = torch.randn(1000)
        assert float(self.prepared(8, x).scale.detach()) == pytest.approx(float(x.abs().max()) / 127)
        assert float(self.prepared(8, x.relu()).scale.detach()) == pytest.approx(float(x.max()) / 255)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_eight_bits_do_not_clip_the_largest_value(self, dtype: torch.dtype) -> None:
        for low in lows(8):
            quantizer = ActivationQuantizer(8).to(dtype)
            for _ in range(20):
                x = activations(low, 100)
                x = torch.cat([x, x.abs().amax(0, keepdim=True)])  # a positive one: there is a code less for those
                quantizer.reset_parameters()
                quantizer.prepare_(x)
                scale = quantizer.scale.detach()
                index, beyond = activation_index(x, scale, quantizer.low.to(torch.float32), 8)
                grad_x, _ = straight_through(torch.ones_like(x), index, beyond, torch.tensor(low), 8)
                assert bool((grad_x == 1).all())
                assert int(index.max()) == 255 or dtype == torch.bfloat16  # one step of its scale is half a code
                assert float(scale) == pytest.approx(float(x.max()) / (255 + low), rel=2 * torch.finfo(dtype).eps)

    def test_later_batches_change_nothing(self) -> None:
        quantizer = self.prepared(4, torch.rand(100))
        scale = quantizer.scale.detach().clone()
        quantizer.prepare_(torch.randn(100) * 1000)
        assert torch.equal(quantizer.scale, scale) and float(quantizer.low) == 0

    def test_an_empty_batch_is_no_first_batch(self) -> None:
        quantizer = self.prepared(4, torch.zeros(0, 3))
        quantizer.prepare_(torch.rand(100))
        assert float(quantizer.scale.detach()) == pytest.approx(2 * 0.5 / 15**0.5, rel=0.2)

    @pytest.mark.parametrize("batch", [torch.zeros(10), torch.full((10,), float("nan"))], ids=["zeros", "NaN"])
    def test_a_batch_that_tells_nothing_gives_a_scale_that_works(self, batch: Tensor) -> None:
        for bits in WIDTHS:
            assert 0 < float(self.prepared(bits, batch).scale.detach()) < float("inf")

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_a_first_batch_that_tells_nothing_leaves_scale_and_range_to_the_next(self, bits: int, value: float) -> None:
        x, first = torch.randn(200), torch.randn(200)
        if value == 0:
            first.zero_()
        first[7] = value
        quantizer = self.prepared(bits, first)
        assert not quantizer.is_ready and quantizer.sources() is None
        quantizer.prepare_(x)
        wanted = self.prepared(bits, x)
        assert quantizer.is_ready
        assert torch.equal(quantizer.scale, wanted.scale) and torch.equal(quantizer.low, wanted.low)

    def test_reset_parameters_lets_the_next_batch_set_it(self) -> None:
        quantizer, x = self.prepared(4, torch.rand(100)), torch.randn(100) * 5
        quantizer.reset_parameters()
        quantizer.prepare_(x)
        wanted = self.prepared(4, x)
        assert torch.equal(quantizer.scale, wanted.scale) and torch.equal(quantizer.low, wanted.low)

    def test_the_scale_stays_positive_whatever_its_parameter(self) -> None:
        quantizer = self.prepared(4, torch.rand(100))
        for value in (-20.0, 0.0, 20.0):
            quantizer.log_gain.data.fill_(value)
            assert float(quantizer.scale.detach()) > 0

    @pytest.mark.parametrize("how", ["deepcopy", "state_dict", "torch.save"])
    def test_what_the_first_batch_set_is_kept(self, how: str) -> None:
        quantizer = self.prepared(4, torch.rand(100))
        quantizer.log_gain.data.fill_(0.3)
        other: Any
        if how == "deepcopy":
            other = copy.deepcopy(quantizer)
        elif how == "state_dict":
            other = ActivationQuantizer(4)
            other.prepare_(torch.randn(50))
            other.load_state_dict(quantizer.state_dict())
        else:
            file = io.BytesIO()
            torch.save(quantizer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        other.prepare_(torch.randn(100) * 77)
        assert torch.equal(other.scale, quantizer.scale) and torch.equal(other.low, quantizer.low)

    def test_a_state_of_one_that_saw_no_batch_lets_the_next_batch_set_it(self) -> None:
        quantizer = self.prepared(4, torch.rand(100))
        quantizer.load_state_dict(ActivationQuantizer(4).state_dict())
        quantizer.prepare_(torch.rand(100) * 10)
        assert float(quantizer.scale.detach()) == pytest.approx(2 * 5 / 15**0.5, rel=0.3)

    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_a_state_whose_scale_is_none_is_refused(self, value: float) -> None:
        quantizer = ActivationQuantizer(4)
        quantizer.prepare_(torch.randn(8))
        scale, state = quantizer.scale.item(), quantizer.state_dict()
        with pytest.raises(RuntimeError, match="initial_scale must be positive, or 0 before the first batch, got "):
            quantizer.load_state_dict(state | {"initial_scale": torch.tensor(value), "log_gain": torch.ones(())})
        assert quantizer.scale.item() == scale and quantizer.is_ready

    def test_it_says_its_bits(self) -> None:
        assert repr(ActivationQuantizer(3)) == "ActivationQuantizer(bits=3)"

    @pytest.mark.parametrize("bits", [0, 9])
    def test_other_widths_are_refused(self, bits: int) -> None:
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            ActivationQuantizer(bits)


@pytest.mark.parametrize("high", [127.0, 255.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_largest_value_is_beyond_the_scale_that_reaches_to_it(dtype: torch.dtype, high: float) -> None:
    for start in range(0, 2**23, 2**21):  # all fractions that a float32 has
        largest = (torch.arange(start, start + 2**21, dtype=torch.int32) | 127 << 23).view(torch.float32)
        scale = reaching_scale(largest, torch.tensor(high), dtype)
        assert torch.equal(scale.to(dtype).to(torch.float32), scale)
        assert bool((largest * (1 / scale) <= high).all())
        # No step more than is needed: the scale below is not the nearest, or clips.
        nearest = (largest / high).to(dtype).to(torch.float32)
        assert bool(((scale == nearest) | (largest * (1 / nearest) > high)).all())
        above = torch.nextafter(nearest.to(dtype), torch.tensor(torch.inf, dtype=dtype)).to(torch.float32)
        assert bool((scale <= above).all())
    tiny = torch.tensor([1e-5, 3e-6, 1e-30])
    assert bool((tiny * (1 / reaching_scale(tiny, torch.tensor(high), dtype)) <= high).all())
    assert float(reaching_scale(torch.tensor(0.0), torch.tensor(high), dtype)) == 0
    assert float(reaching_scale(torch.tensor(high), torch.tensor(high), dtype)) == 1


def test_constants_follow_every_kind_of_write() -> None:
    quantizer = ActivationQuantizer(8)
    quantizer.prepare_(torch.randn(100))

    def agrees(of: ActivationQuantizer) -> bool:
        scale, low = of.constants()
        with torch.no_grad():
            return torch.equal(scale, of.scale) and torch.equal(low, of.low.to(torch.float32))

    assert agrees(quantizer)
    assert quantizer.constants()[0] is quantizer.constants()[0]
    before = quantizer.constants()[0].clone()
    quantizer.log_gain.data.fill_(0.5)  # counts no version
    assert agrees(quantizer)
    assert not torch.equal(quantizer.constants()[0], before)
    copied = copy.deepcopy(quantizer)
    copied.initial_scale.data.mul_(3)
    assert agrees(copied)
    assert agrees(quantizer)
    quantizer.load_state_dict(copied.state_dict())
    assert torch.equal(quantizer.constants()[0], copied.constants()[0])
    with torch.inference_mode():
        quantizer.low.add_(1)
        assert agrees(quantizer)
    assert agrees(quantizer.to(torch.bfloat16))
    quantizer.reset_parameters()
    quantizer.prepare_(torch.rand(100))
    assert agrees(quantizer)


def test_constants_are_not_pickled_and_reach_no_gradient() -> None:
    quantizer = ActivationQuantizer(4)
    quantizer.prepare_(torch.randn(100))
    scale, low = quantizer.constants()
    assert quantizer.sources() is not None
    assert not scale.requires_grad
    assert low.data_ptr() != quantizer.low.data_ptr()
    copied = pickle.loads(pickle.dumps(quantizer))
    assert (copied._constants, copied._sources, copied._places) == (None, (), ())


def test_sources_are_one_object_while_they_are_the_same_tensors_in_the_same_places() -> None:
    quantizer = ActivationQuantizer(8)
    assert quantizer.sources() is None
    quantizer.prepare_(torch.randn(100))
    first = quantizer.sources()
    assert first is not None
    assert [id(t) for t in first] == [id(t) for t in (quantizer.log_gain, quantizer.initial_scale, quantizer.low)]
    quantizer.log_gain.data.fill_(0.5)
    assert quantizer.sources() is first
    seen = [first]
    quantizer.log_gain.data = torch.tensor(0.25)
    seen.append(quantizer.sources())
    quantizer.log_gain = torch.nn.Parameter(torch.tensor(0.25))
    seen.append(quantizer.sources())
    quantizer.low = torch.tensor(-64.0)
    seen.append(quantizer.sources())
    quantizer.to(torch.bfloat16)
    seen.append(quantizer.sources())
    assert len({id(sources) for sources in seen}) == len(seen)
    quantizer.load_state_dict(quantizer.state_dict())
    assert quantizer.sources() is None
