"""How activations become codes of 1 to 8 bits with a learned scale, and what of them backward keeps.

Learned step size quantization (Esser et al. 2020, arXiv:1902.08153). An activation x is stored as an unsigned index,

    index = clamp(round(x / scale), low, high) - low            value = (index + low) * scale

where low is 0 after a ReLU and -2**(bits-1) otherwise. At 1 bit the codes are -1 and +1 (0 counts as +1).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitorch_engine.bits import bit_format


class ActivationQuantizer(nn.Module):
    """The learned scale of one tensor of activations: ``initial_scale * exp(log_gain)``, always positive.

    The first batch sets ``initial_scale`` (0 until then) and ``low``, the code of index 0. Learning the logarithm makes
    an optimizer's step relative to the scale, and weight decay pulls towards the first batch's scale, not to zero.
    """

    initial_scale: Tensor
    low: Tensor

    def __init__(self, bits: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bits = bit_format(bits).bits
        self.log_gain = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("initial_scale", torch.zeros((), device=device))
        self.register_buffer("low", torch.zeros((), device=device))
        self._ready = False
        self._constants: tuple[tuple[float, ...], Tensor, Tensor] | None = None
        self._sources: tuple[Tensor, ...] = ()
        self._places: tuple[int, ...] = ()

    @property
    def scale(self) -> Tensor:
        """What one code is worth: 0-dim float32, differentiable."""
        return self.initial_scale.to(torch.float32) * self.log_gain.to(torch.float32).exp()

    @property
    def is_ready(self) -> bool:
        """Whether a batch has set scale and range, or a checkpoint."""
        return self._ready

    def sources(self) -> tuple[Tensor, ...] | None:
        """What ``constants`` are made of: one object while these are the same tensors, and where they were; None until
        they are set."""
        state = self.__dict__  # an attribute of a module takes three times as long
        if not state["_ready"]:
            return None
        buffers = state["_buffers"]
        log_gain, initial_scale, low = state["_parameters"]["log_gain"], buffers["initial_scale"], buffers["low"]
        places = (log_gain.data_ptr(), initial_scale.data_ptr(), low.data_ptr())
        kept: tuple[Tensor, ...] = state["_sources"]
        if places == state["_places"] and kept[0] is log_gain and kept[1] is initial_scale and kept[2] is low:
            return kept
        made = state["_sources"] = (log_gain, initial_scale, low)
        state["_places"] = places
        return made

    def constants(self) -> tuple[Tensor, Tensor]:
        """(scale, low), both float32, as numbers that no gradient reaches: made once, as long as what they are made of
        stays. It reads values, on the CPU; a version would miss writes through ``.data``."""
        log_gain: Tensor = self._parameters["log_gain"]  # type: ignore[assignment]
        initial_scale: Tensor = self._buffers["initial_scale"]  # type: ignore[assignment]
        low: Tensor = self._buffers["low"]  # type: ignore[assignment]
        values = (log_gain.item(), initial_scale.item(), low.item())
        kept = self._constants
        if kept is None or kept[0] != values:
            with torch.no_grad():
                kept = values, self.scale, low.to(torch.float32, copy=True)
            self._constants = kept
        return kept[1], kept[2]

    def reset_parameters(self) -> None:
        """Forget scale and range: the next batch sets them."""
        with torch.no_grad():
            self.log_gain.zero_()
            self.initial_scale.zero_()
            self.low.zero_()
        self._ready = False

    def prepare_(self, x: Tensor) -> None:
        """Set scale and range from a batch, once. On several ranks all take part, and all get the same."""
        if self._ready or x.numel() == 0:
            return
        form = bit_format(self.bits)
        with torch.no_grad():
            wide = x.detach().to(torch.float32)
            mean, largest, smallest = _across_ranks(wide.abs().mean(), wide.abs().amax(), wide.amin())
            signed = (smallest < 0) | (self.bits == 1)
            high = torch.where(signed, float(form.high), float(form.levels - 1))
            # 8 bits reach to the largest value; below that, Esser et al., section 2.1; a sign stands for the mean size.
            start = mean if self.bits == 1 else 2 * mean / high.sqrt()
            if self.bits == 8:
                start = reaching_scale(largest, high, self.initial_scale.dtype)
            start = torch.where(torch.isfinite(start) & (start > 0), start, 1.0)
            loaded = self.initial_scale > 0  # from a checkpoint: its scale and range stay
            self.low.copy_(torch.where(loaded, self.low, torch.where(signed, float(form.low), 0.0)))
            self.initial_scale.copy_(torch.where(loaded, self.initial_scale, start))
        self._ready = True

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_constants": None, "_sources": (), "_places": ()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False


def reaching_scale(largest: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """``largest / high`` in ``dtype``, or the next number above it where ``largest`` would come out beyond ``high``: it
    is multiplied by the rounded ``1 / scale``, and what is beyond has no gradient.

    Not below the least normal number of ``dtype``, unless ``largest`` is 0: beneath, the next one is too far.
    """
    least = (largest > 0) * torch.finfo(dtype).tiny
    scale = torch.maximum(largest / high, least).to(dtype)
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale, above = scale.to(torch.float32), above.to(torch.float32)
    return torch.where(largest * (1 / scale) > high, above, scale)


def _across_ranks(mean: Tensor, largest: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not (dist.is_available() and dist.is_initialized()):
        return mean, largest, smallest
    dist.all_reduce(mean)
    extremes = torch.stack([largest, -smallest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return mean / dist.get_world_size(), extremes[0], -extremes[1]
