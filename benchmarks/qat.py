"""The baseline: quantization-aware training, which trains a float32 master copy and rounds it at every step."""

from typing import Any

import torch
from torch import Tensor, nn

from bitorch_engine.bits import BitFormat, bit_format
from bitorch_engine.quantizers.weight import fit_scale


class QATConv2d(nn.Conv2d):
    """A convolution whose float weight is rounded to ``w_bit`` bits in forward, with a learned step size.

    Learned step size quantization (Esser et al. 2020, arXiv:1902.08153), one scale an output channel. As in the
    library, the scale's logarithm is learned, so that an Adam step of lr is relative to the scale.
    """

    def quantize_(self, w_bit: int) -> None:
        """Begin to round, with the scale that the library would give these weights."""
        self.format = bit_format(w_bit)
        scale = fit_scale(self.weight.detach().flatten(1), self.format)
        self.register_buffer("initial_scale", scale.view(-1, 1, 1, 1))
        self.log_gain = nn.Parameter(torch.zeros_like(self.initial_scale))

    @property
    def scale(self) -> Tensor:
        """What one code is worth: (out, 1, 1, 1)."""
        return self.initial_scale * self.log_gain.exp()

    @property
    def codes(self) -> Tensor:
        """The integers that forward multiplies by the scale."""
        return _round(self.weight.detach() / self.scale.detach(), self.format)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _FakeQuantize.apply(self.weight, self.scale, self.format), self.bias)


class _FakeQuantize(torch.autograd.Function):
    """code * scale. Straight through within the range; the scale's gradient is equation 3 of Esser et al."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.format = form
        return _round(weight / scale, form) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        form = ctx.format
        ratio = weight / scale
        codes = _round(ratio, form)
        margin = form.step / 2
        if form.bits == 1:  # the code is the sign; the gradient is let through up to twice the code's size
            within, slope = ratio.abs() <= 2, codes
        else:
            within = (ratio >= form.low - margin) & (ratio <= form.high + margin)
            slope = torch.where(within, codes - ratio, codes)
        grad_scale = (grad * slope).sum((1, 2, 3), keepdim=True)
        return torch.where(within, grad, 0), grad_scale, None


def _round(ratio: Tensor, form: BitFormat) -> Tensor:
    index = ((ratio - form.low) / form.step).round().clamp(0, form.levels - 1)
    return index * form.step + form.low
