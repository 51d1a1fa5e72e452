"""What is stored of a moment is, on average over the noise, the moment."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine.ops import direction_, moment_fits, new_moment, noise_bits, noise_key
from bitorch_engine.ops.reference.moments import BLOCK, load_moment, store_moment_

CPU = torch.device("cpu")
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "8bit": torch.uint8}
ROUNDED = {name: dtype for name, dtype in STORED.items() if name != "float32"}


def store_and_load(values: Tensor, dtype: torch.dtype, key: int, *, signed: bool) -> Tensor:
    stored = new_moment(values.shape, dtype, CPU)
    noise = noise_bits(key, 0, values.numel(), CPU)
    store_moment_(stored, 0, values.reshape(-1), noise, signed=signed)
    return load_moment(stored, 0, values.numel(), torch.float64, signed=signed).view(values.shape)


def moments_of(gradients: list[Tensor], dtype: torch.dtype, **betas: float) -> tuple[Tensor, Tensor]:
    """Second and first moment after those gradients, as float64."""
    settings = {"correction1": 1.0, "correction2": 1.0, "grad_factor": 1.0} | betas
    shape = gradients[0].shape
    v, m = new_moment(shape, dtype, CPU), new_moment(shape, dtype, CPU)
    for t, grad in enumerate(gradients):
        direction_(grad, v, m, eps=1e-8, dtype=torch.float32, key=noise_key(t), **settings)
    count = gradients[0].numel()
    return (
        load_moment(v, 0, count, torch.float64, signed=False).view(shape),
        load_moment(m, 0, count, torch.float64, signed=True).view(shape),
    )


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_a_new_moment_is_zero_and_fits_its_shape_only(dtype: torch.dtype) -> None:
    for shape in [(3, 5), (128,), (129,), (2, 64, 3, 3)]:
        moment = new_moment(shape, dtype, CPU)
        count = torch.Size(shape).numel()
        assert not load_moment(moment, 0, count, torch.float32, signed=True).any()
        assert moment_fits(moment, shape)
        assert not moment_fits(moment, (*shape, 200))


def test_an_8bit_moment_takes_a_byte_an_element_and_a_float_a_block() -> None:
    moment = new_moment((1000, 128), torch.uint8, CPU)
    assert moment.untyped_storage().nbytes() == 1000 * (128 + 4)


def spacing(values: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """No two neighbouring stored values around these lie farther apart."""
    if dtype != torch.uint8:
        return values.abs() * (2**-7 if dtype == torch.bfloat16 else 2**-10) + 2**-24
    largest = values.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    return (values.abs() + largest * 2.0 ** (-7 if signed else -15)) / 16


@pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("dtype", ROUNDED.values(), ids=ROUNDED)
def test_the_mean_of_what_is_stored_over_many_keys_is_the_value(dtype: torch.dtype, signed: bool) -> None:
    keys = 1000
    values = torch.randn(2 * BLOCK)
    # squares from 1e-5 on: an 8-bit second moment that is smaller than its first code is stored as that
    values = (values if signed else values.square().clamp_min(1e-3)).double()
    seen = torch.stack([store_and_load(values.float(), dtype, noise_key(key), signed=signed) for key in range(keys)])
    gap = spacing(values, dtype, signed=signed)
    off = seen.mean(0) - values
    # five standard errors, and what a neighbour that is rarer than one in a hundred keys may contribute
    assert bool((off.abs() < 5 * seen.std(0) / keys**0.5 + 0.012 * gap).all())
    assert abs(float((off / gap).mean())) < 5 * 0.5 / (keys * values.numel()) ** 0.5


@pytest.mark.parametrize("dtype", ROUNDED.values(), ids=ROUNDED)
def test_a_stored_value_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    values = torch.randn(BLOCK, dtype=torch.float32)
    seen = torch.stack([store_and_load(values, dtype, noise_key(key), signed=True) for key in range(60)])
    for element in seen.unbind(1):
        assert element.unique().numel() <= 2


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_zero_is_kept_exactly_beside_any_other_value(dtype: torch.dtype) -> None:
    values = torch.zeros(3 * BLOCK)
    values[5], values[2 * BLOCK] = -1.5, 0.75
    for key in range(200):
        for signed, wanted in ((True, values), (False, values.abs())):
            seen = store_and_load(wanted, dtype, noise_key(key), signed=signed)
            assert torch.equal(seen == 0, wanted == 0)
            assert torch.allclose(seen.float(), wanted, rtol=1 / 16, atol=0)


@pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])
@given(st.floats(2.0**-100, 2.0**120, width=32), st.integers(0, 2**32 - 1))
def test_the_largest_of_a_block_in_8_bits_has_a_code_at_any_size(signed: bool, largest: float, key: int) -> None:
    values = torch.full((BLOCK,), largest)
    values[::2] *= torch.rand(BLOCK // 2)
    seen = store_and_load(values, torch.uint8, key, signed=signed)
    assert bool(((seen - values).abs() <= spacing(values.double(), torch.uint8, signed=signed) * 1.01).all())


@given(st.lists(st.floats(0, 2.0**-90, width=32), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_denormal_moments_in_8_bits_stay_finite_and_near(values: list[float], key: int) -> None:
    given_values = torch.tensor(values)
    for signed in (True, False):
        seen = store_and_load(given_values, torch.uint8, key, signed=signed)
        assert bool(((seen - given_values).abs() <= given_values.amax() / 16 + 2.0**-129).all())


def test_a_positive_second_moment_never_becomes_zero_in_8_bits() -> None:
    values = torch.logspace(-30, 0, 4 * BLOCK, dtype=torch.float32)
    for key in range(50):
        stored = store_and_load(values, torch.uint8, noise_key(key), signed=False)
        assert float(stored.min()) > 0


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_slices_store_and_load_what_the_whole_does(dtype: torch.dtype) -> None:
    values = torch.randn(3 * BLOCK + 17)
    noise = noise_bits(3, 0, values.numel(), CPU)
    whole, parts = new_moment(values.shape, dtype, CPU), new_moment(values.shape, dtype, CPU)
    store_moment_(whole, 0, values, noise, signed=True)
    for start, stop in ((0, BLOCK), (BLOCK, 3 * BLOCK), (3 * BLOCK, values.numel())):
        store_moment_(parts, start, values[start:stop], noise[start:stop], signed=True)
        assert torch.equal(
            load_moment(whole, start, stop, torch.float32, signed=True),
            load_moment(whole, 0, values.numel(), torch.float32, signed=True)[start:stop],
        )
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("beta2", [0.999, 0.9999])
@pytest.mark.parametrize("dtype", ROUNDED.values(), ids=ROUNDED)
def test_the_second_moment_of_stationary_gradients_stays_at_their_variance(dtype: torch.dtype, beta2: float) -> None:
    steps, sigma = 1000, torch.tensor([1.0, 1e-3, 1e-4, 1e-6]).repeat_interleave(4 * BLOCK)
    if dtype == torch.float16:
        # what update does for float16: the gradient comes near 1 by a power of two, so one size of gradient is enough
        sigma = torch.full((4 * BLOCK,), 0.7)
    v = new_moment(sigma.shape, dtype, CPU)
    settings = {"beta1": 0.9, "beta2": beta2, "correction1": 1.0, "correction2": 1.0, "grad_factor": 1.0}
    for t in range(steps):
        grad = sigma * torch.randn(sigma.shape)
        direction_(grad, v, None, eps=0.0, dtype=torch.float32, key=noise_key(t), **settings)
    stored = load_moment(v, 0, sigma.numel(), torch.float64, signed=False)
    ratio = (stored / sigma.double().square() / (1 - beta2**steps)).view(-1, 4 * BLOCK)
    # over 512 elements: the squares' own noise has a standard error of 0.2 %, that of rounding to 8 bits 0.7 %
    assert float((ratio.mean(1) - 1).abs().max()) < (0.025 if dtype == torch.uint8 else 0.01)
    assert float(ratio.min()) > (0.4 if dtype == torch.uint8 else 0.5)


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_the_moments_are_the_moving_averages_of_the_gradients(dtype: torch.dtype) -> None:
    beta1, beta2 = 0.9, 0.99
    gradients = [torch.randn(40, BLOCK) * torch.logspace(-1, 0, BLOCK) for _ in range(25)]
    m_true = v_true = torch.zeros(40, BLOCK, dtype=torch.float64)
    for grad in gradients:
        m_true = beta1 * m_true + (1 - beta1) * grad.double()
        v_true = beta2 * v_true + (1 - beta2) * grad.double().square()
    v, m = moments_of(gradients, dtype, beta1=beta1, beta2=beta2)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.003, torch.uint8: 0.12}[dtype]
    for stored, true in ((m, m_true), (v, v_true)):
        error = (stored - true) / true.square().mean(0).sqrt()
        assert float(error.square().mean().sqrt()) < rounding
        assert abs(float(error.mean())) < 5 * rounding / error.numel() ** 0.5 + 1e-7
