"""The GPU's gradient of a packed weight is the one in float64, bit for bit after the scale."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.ops.triton import grad_weight as kernels
from tests.ops.cpu.test_conv import Case, Operands, operands
from tests.ops.triton.test_quantized_conv import CASES


def run(o: Operands, grad: Tensor, grad_scale: Tensor, device: torch.device) -> Tensor:
    codes = grad.to(torch.int8).movedim(1, -1).contiguous().to(device)
    tensors = (grad_scale.to(device), o.packed_codes().to(device), o.scale.to(device), o.low.to(device))
    return kernels.conv_grad_weight(codes, *tensors, o.a_bit, list(o.case.shape), *o.geometry, torch.float32).cpu()


def expected(o: Operands, grad: Tensor, grad_scale: Tensor) -> Tensor:
    """By autograd, in float64."""
    case = o.case
    weight = torch.zeros(case.weight, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (total,) = torch.autograd.grad(case.expected(o.codes, weight), weight, grad.double())
    factor = (grad_scale * o.scale).view(-1)
    if case.transposed:  # (inputs, outputs of a group, *kernel)
        factor = factor.view(case.groups, 1, -1).expand(-1, case.weight[0] // case.groups, -1).flatten(0, 1)
        return total.float() * factor.view(*factor.shape, *[1] * (total.dim() - 2))
    return total.float() * factor.view(-1, *[1] * (total.dim() - 1))


def gradient(case: Case) -> tuple[Tensor, Tensor]:
    grad = torch.randint(-127, 128, case.convolution.output_shape(case.shape, case.weight)).float()
    return grad, torch.rand(1, case.out_channels, *[1] * (len(case.shape) - 2))


@pytest.fixture(autouse=True)
def _no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed here, a kernel has computed."""
    monkeypatch.setattr(kernels, "reference", None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_that_of_autograd(case: Case, device: torch.device) -> None:
    o = operands(case, 8, 4, signed=False)
    grad, grad_scale = gradient(case)
    assert torch.equal(run(o, grad, grad_scale, device), expected(o, grad, grad_scale))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_of_a_float_gradient_too(case: Case, device: torch.device) -> None:
    o = operands(case, 8, 4, signed=False)
    grad, _ = gradient(case)
    tensors = (t.to(device) for t in (grad, o.packed_codes(), o.scale, o.low))
    rest = (o.a_bit, list(case.shape), *o.geometry, torch.float32, False)
    found = kernels.conv_grad_weight_float(*tensors, *rest).cpu()
    wanted = expected(o, grad, torch.ones(1, case.out_channels, *[1] * (len(case.shape) - 2)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("a_bit", range(1, 9))
def test_every_width_of_activations_is_exact(a_bit: int, device: torch.device) -> None:
    o = operands(Case((70, 33, 1), (9, 33, 1)), a_bit)
    grad, grad_scale = gradient(o.case)
    assert torch.equal(run(o, grad, grad_scale, device), expected(o, grad, grad_scale))


@pytest.mark.parametrize("name", ["groups", "depthwise", "rgb", "transposed"])
def test_programs_that_share_the_pixels_add_their_sums(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_EXACT", 65)  # as if int32 held no more: the sums are int64
    case = CASES[name]._replace(shape=(9, *CASES[name].shape[1:]))
    o = operands(case, 8, 4, signed=False)
    grad, grad_scale = gradient(case)
    assert torch.equal(run(o, grad, grad_scale, device), expected(o, grad, grad_scale))


def test_sums_beyond_32_bits_are_exact(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DEPTH", 1024)  # so many pixels take the interpreter long in short steps
    case = Case((2, 4, 33501), (4, 4, 1))
    o = operands(case, 8, 4, signed=False)
    o = o._replace(index=torch.full_like(o.index, 255))
    grad = torch.full(case.shape, -127.0)
    one = torch.ones(1, 4, 1)
    assert int(expected(o, grad, one / o.scale).abs().max()) > 1 << 31
    assert torch.equal(run(o, grad, one, device), expected(o, grad, one))


def test_an_empty_batch_gives_zeros(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    o = operands(Case((0, 4, 5, 6), (3, 4, 3, 3)))
    grad = torch.zeros(0, 3, 3, 4)
    assert torch.equal(run(o, grad, torch.ones(1, 3, 1, 1), device), torch.zeros(o.case.weight))
