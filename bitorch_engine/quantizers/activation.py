"""How activations become codes of 1 to 8 bits with a learned scale, and what of them backward keeps.

Learned step size quantization (Esser et al. 2020, arXiv:1902.08153). An activation x is stored as an unsigned index,

    index = clamp(round(x / scale), low, high) - low            value = (index + low) * scale

where low is 0 after a ReLU and -2**(bits-1) otherwise. At 1 bit the codes are -1 and +1 (0 counts as +1).
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitorch_engine.bits import bit_format, has_values

_BEFORE = 2.0**-40
"""The scale until a batch has set one: that of zeros, which 1 bit makes +scale of, and of what is not finite."""

_numbers = count()
_quantizers: "WeakValueDictionary[int, ActivationQuantizer]" = WeakValueDictionary()
"""By number, for ``_prepare_when_run``."""


class ActivationQuantizer(nn.Module):
    """The learned scale of one tensor of activations: ``initial_scale * exp(log_gain)``, always positive.

    The first batch that is finite and not all zeros sets ``initial_scale`` (0 until then) and ``low``, the code of
    index 0. Where it was no real data, ``reset_parameters()`` lets the next one do that. Learning the logarithm makes
    an optimizer's step relative to the scale, and weight decay pulls towards the first batch's scale, not to zero.

    In a forward of DistributedDataParallel that records gradients, its ranks set them together at their first batch,
    which may be empty for some; all of them have to run the layer then. Elsewhere each process takes its own batch, and
    waits for nobody.
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
        self._agreed = False  # with the other ranks
        self._number = _registered(self)
        self._constants: tuple[tuple[float, ...], Tensor, Tensor] | None = None
        self._sources: tuple[Tensor, ...] = ()
        self._places: tuple[int, ...] = ()

    @property
    def scale(self) -> Tensor:
        """What one code is worth: 0-dim float32, differentiable."""
        initial = self.initial_scale.to(torch.float32)
        if not self._ready:
            initial = torch.where(initial > 0, initial, _BEFORE)
        return initial * self.log_gain.to(torch.float32).exp()

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
        """Set scale and range from a batch, once. One that is empty, all zeros or not finite leaves it to the next."""
        if self._ready and (self._agreed or not _may_agree()):
            return
        x, records = x.detach(), torch.is_grad_enabled()
        # Not is_exporting(), which in torch 2.11 is true of all that is compiled.
        if torch.compiler._is_exporting_flag or x.is_meta or type(x) is not Tensor:
            _set_(self.initial_scale, self.low, *_statistics(x), self.bits)  # whose values nobody sees: not ready yet
        elif torch.compiler.is_compiling():
            _prepare_when_run(x, self.initial_scale, self.low, self._number, records)
        else:
            self._prepare_now_(x, records)

    @torch.no_grad()
    def _prepare_now_(self, x: Tensor, records: bool) -> None:
        active = DistributedDataParallel._active_ddp_module if records else None
        if self._ready and active is None:
            return
        statistics = _statistics(x)
        if active is not None:
            statistics = _agree_(self.initial_scale, self.low, *statistics, x.numel(), active.process_group)
            self._agreed = True
        _set_(self.initial_scale, self.low, *statistics, self.bits)
        self._ready = bool(self.initial_scale > 0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_constants": None, "_sources": (), "_places": ()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """With a scale that is no scale, no batch would set another, and the layer would give its bias alone."""
        scale = state_dict.get(prefix + "initial_scale")
        if isinstance(scale, Tensor) and has_values(scale) and not bool(((scale >= 0) & (scale < torch.inf)).all()):
            *_, errors = args
            errors.append(f"{prefix}initial_scale must be positive, or 0 before the first batch, got {scale.tolist()}.")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = _registered(self)


def _registered(quantizer: ActivationQuantizer) -> Tensor:
    """A number of its own, 0-dim: compiled code reads it, and is the same for all quantizers."""
    number = next(_numbers)
    _quantizers[number] = quantizer
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("bitorch_engine::prepare_activation", mutates_args=("initial_scale", "low"))
def _prepare_when_run(x: Tensor, initial_scale: Tensor, low: Tensor, number: Tensor, records: bool) -> None:
    """``prepare_`` for compiled code: what it finds out makes the quantizer ready, and the code is compiled again."""
    quantizer = _quantizers[int(number)]
    quantizer._prepare_now_(x, records)
    if initial_scale is not quantizer.initial_scale:  # a compiler may pass copies
        initial_scale.copy_(quantizer.initial_scale)
        low.copy_(quantizer.low)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean size, largest size, smallest value) of a batch, 0-dim float32; an empty one is as one of zeros."""
    wide = x.to(torch.float32)
    if x.numel() == 0:
        return (wide.new_zeros(()),) * 3
    size = wide.abs()
    return size.mean(), size.amax(), wide.amin()


def _set_(initial_scale: Tensor, low: Tensor, mean: Tensor, largest: Tensor, smallest: Tensor, bits: int) -> None:
    """Set scale and range where there are none yet, and the batch tells something."""
    form = bit_format(bits)
    signed = (smallest < 0) | (bits == 1)
    high = torch.where(signed, float(form.high), float(form.levels - 1))
    # 8 bits reach to the largest value; below that, Esser et al., section 2.1; a sign stands for the mean size.
    start = mean if bits == 1 else 2 * mean / high.sqrt()
    if bits == 8:
        start = reaching_scale(largest, high, initial_scale.dtype)
    start = start.to(initial_scale.dtype)
    tells = torch.isfinite(mean) & torch.isfinite(start) & (start > 0) & (initial_scale == 0)
    low.copy_(torch.where(tells | (bits == 1), torch.where(signed, float(form.low), 0.0), low))
    initial_scale.copy_(torch.where(tells, start, initial_scale))


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


def _may_agree() -> bool:
    """Whether this is a forward in which the ranks of a DistributedDataParallel agree; if compiled, it may be one."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
    return DistributedDataParallel._active_ddp_module is not None and torch.is_grad_enabled()


def _agree_(
    initial_scale: Tensor, low: Tensor, mean: Tensor, largest: Tensor, smallest: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the batches of all ranks together; scale and range become those that a rank has already."""
    sums = torch.stack([mean * count, torch.full_like(mean, count)])
    extremes = torch.stack([largest, -smallest, initial_scale.to(mean.dtype), -low.to(mean.dtype)])
    dist.all_reduce(sums, group=group)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    initial_scale.copy_(extremes[2])
    low.copy_(0.0 - extremes[3])
    return sums[0] / sums[1].clamp_min(1), extremes[0], -extremes[1]
