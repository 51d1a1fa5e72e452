"""The optimizer for models that mix packed and float parameters."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from bitorch_engine import ops
from bitorch_engine.optim.galore_projector import GaLoreProjector
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.parameters.step import (
    all_true,
    check_finite,
    check_moments,
    is_finite,
    prepare_,
    squares_of_rows,
    step_,
    step_float_,
)

_MOMENT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "8bit": torch.uint8,
    "channel": torch.float32,
}


class DiodeMix(torch.optim.Optimizer):
    """AdamW that steps packed weights in their codes, and all other parameters as AdamW does.

    lr: in units of the weight, for both kinds; a learning rate that suits AdamW in float carries over.
    betas, eps, weight_decay, correct_bias: Adam's; decay is decoupled, and for packed weights it acts on the scale.
    dtype: what packed steps are computed in, float32 or float64.
    memory: how the moments of packed weights are stored; bytes a weight with codes and residual (1 byte) included:

        "fp32" 9     "bf16" or "fp16" 5     "8bit" 3.06, the default     "channel" about 1.02

        "channel" has no first moment, and one second moment an output channel: the least memory. It is not for a
        constant learning rate: anneal it to 0. Moments of float parameters are float32; with "channel", matrices of
        4096 elements or more do without most of theirs in the same way.

    Group keys ``rank, update_proj_gap, scale, proj_type`` switch on GaLore for the group: parameters of two or more
    dimensions are stepped in a gradient of low rank. Every key can be set for a group.
    Defaults differ from the original BITorch Engine's (lr 1e-4, betas (0.99, 0.9999)), which need ten thousands of
    steps.

    A step with a NaN or Inf gradient in any parameter raises ValueError, and nothing has changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        dtype: torch.dtype = torch.float32,
        *,
        memory: str = "8bit",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "dtype": dtype,
            "memory": memory,
        }
        super().__init__(params, defaults)
        self._prepared: dict[Tensor, ops.PreparedUpdate] = {}  # of packed weights; no part of the state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)
        work = [
            (group, [(p, grad, *_look_at(group, p, grad)) for p in group["params"] if (grad := p.grad) is not None])
            for group in self.param_groups
        ]
        if not all_true(finite for _, parameters in work for *_, finite in parameters):
            for _, parameters in work:
                for _, grad, *_ in parameters:
                    check_finite(grad)
        for group, parameters in work:
            self._step_group(group, [(p, grad, squares) for p, grad, squares, _ in parameters])
        return loss

    def step_in_backward(self) -> list[RemovableHandle]:
        """From now on every parameter steps as soon as backward has its gradient, which is freed at once.

        Gradients of one layer at a time exist then. ``step()`` finds nothing left to do. Not for gradient accumulation,
        clipping by the norm of all gradients, GradScaler, or several ranks, which all need the gradients together; and
        a gradient that is not finite raises when the layers after it have stepped already. Learning rates are those at
        the time of backward. A parameter that is in no group any more keeps its gradient. Returns handles whose
        ``remove()`` ends it.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise NotImplementedError("step_in_backward steps before gradients are averaged over ranks; use step().")

        @torch.no_grad()
        def hook(p: Tensor) -> None:
            grad, group = p.grad, self._group_of(p)
            if grad is None or group is None:
                return
            _check_group(group)
            squares, finite = _look_at(group, p, grad)
            if not bool(finite):
                check_finite(grad)
            self._step_group(group, [(p, grad, squares)])
            p.grad = None

        return [
            p.register_post_accumulate_grad_hook(hook)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]

    def _group_of(self, p: Tensor) -> dict[str, Any] | None:
        """Looked for each time: load_state_dict makes new groups, and others may be taken out."""
        return next((group for group in self.param_groups if id(p) in map(id, group["params"])), None)

    def _step_group(self, group: dict[str, Any], work: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """work: parameters of the group, their gradients, and what ``_look_at`` gave for those."""
        settings = {
            "lr": float(group["lr"]),
            "weight_decay": group["weight_decay"],
            "betas": group["betas"],
            "eps": group["eps"],
            "correct_bias": bool(group["correct_bias"]),
        }
        together = []
        for p, grad, squares in work:
            state = self.state[p]
            if _steps_as_torch(group, p, grad, state):
                together.append((p, grad, state))
            else:
                self._step_one(group, settings, p, grad, state, squares)
        for on_cpu in (True, False):
            _step_together(group, settings, [one for one in together if one[0].is_cpu == on_cpu], on_cpu)

    def _step_one(
        self,
        group: dict[str, Any],
        settings: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        squares: Tensor | None,
    ) -> None:
        """Step one parameter by itself. squares: what ``_look_at`` gave for its gradient."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            if "rank" in group and p.dim() >= 2:
                state["projector"] = GaLoreProjector(group["rank"], **_galore_options(group))
        projector = state.get("projector")
        if projector is not None:
            rows = p.to_rows(grad) if isinstance(p, PackedParameter) else grad.flatten(1)
            grad = projector.project(rows, int(state["step"]))
        if "exp_avg_s" not in state:
            state |= _new_moments(p, grad, group["memory"])
        moments = state["exp_avg_s"], state.get("exp_avg_l")
        if isinstance(p, PackedParameter):
            prepared = None
            if projector is None and group["dtype"] != torch.float64:
                prepared = self._prepared.get(p)
            if prepared is None or not prepared.fits(p.packed, p.residual, p.channel_scale, grad, *moments):
                check_moments(p, grad, *moments, projected=projector is not None)
                prepared = None if projector is not None else prepare_(p, grad, *moments, group["dtype"])
                if prepared is not None:
                    self._prepared[p] = prepared
            step_(
                p, *moments, state["step"], dtype=group["dtype"], projector=projector, grad=grad, squares=squares,
                prepared=prepared, **settings,
            )  # fmt: skip
        else:
            step_float_(p, *moments, state["step"], projector=projector, grad=grad, **settings)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: a projector stands as its own state_dict."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            index: {k: v.state_dict() if isinstance(v, GaLoreProjector) else v for k, v in state.items()}
            for index, state in state_dict["state"].items()
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a ``state_dict`` back, bit for bit."""
        super().load_state_dict(state_dict)
        # torch casts every state tensor to the dtype of its parameter; moments keep their own.
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        groups = chain.from_iterable([group] * len(group["params"]) for group in self.param_groups)
        for index, p, group in zip(indices, params, groups, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key == "projector":
                    self.state[p][key] = GaLoreProjector(group["rank"], **_galore_options(group))
                    bases = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in value.items()}
                    self.state[p][key].load_state_dict(bases)
                elif isinstance(value, Tensor):
                    self.state[p][key] = value.to("cpu" if key == "step" else p.device, copy=True)


def _look_at(group: dict[str, Any], p: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """(what a parameter's own step needs, whether its gradient is surely finite) from one pass over it."""
    if grad.layout is not torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else "sparse"
        raise TypeError(
            f"DiodeMix steps parameters with dense, real gradients, got a {kind} one, of shape {tuple(grad.shape)}; "
            "give that parameter another optimizer (torch.optim's SparseAdam, or AdamW). Nothing was changed."
        )
    if group["memory"] == "channel" and isinstance(p, PackedParameter):
        return squares_of_rows(p, grad)
    return None, is_finite(grad)


def _steps_as_torch(group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    """Whether torch's AdamW does what is done with a parameter here: many small ones then cost little."""
    return (
        type(p) is nn.Parameter
        and (p.is_cpu or p.is_cuda)
        and p.dtype is torch.float32
        and grad.dtype is torch.float32
        and p.is_contiguous()
        and grad.is_contiguous()
        and group["correct_bias"]
        and "rank" not in group
        and ("exp_avg_l" in state if state else not _is_channel_matrix(p, group["memory"]))
    )


def _step_together(
    group: dict[str, Any],
    settings: dict[str, Any],
    work: list[tuple[Tensor, Tensor, dict[str, Any]]],
    on_cpu: bool,
) -> None:
    """Step parameters for which ``_steps_as_torch``, with their gradients and states, in one call of torch's AdamW."""
    if not work:
        return
    for p, grad, state in work:
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32)} | _new_moments(p, grad, group["memory"])
    adamw(
        [p for p, _, _ in work],
        [grad for _, grad, _ in work],
        [state["exp_avg_l"] for _, _, state in work],
        [state["exp_avg_s"] for _, _, state in work],
        [],
        [state["step"] for _, _, state in work],
        # Fused, a GPU would want the step counters in its memory; one kernel for many tensors does without.
        fused=on_cpu,
        foreach=not on_cpu,
        amsgrad=False,
        beta1=settings["betas"][0],
        beta2=settings["betas"][1],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        maximize=False,
    )


def _new_moments(p: Tensor, grad: Tensor, memory: str) -> dict[str, Tensor]:
    if memory == "channel" and isinstance(p, PackedParameter):
        return {"exp_avg_s": torch.zeros_like(p.channel_scale)}
    if _is_channel_matrix(p, memory):
        shape = p.shape[0], *[1] * (p.dim() - 1)
        return {"exp_avg_s": torch.zeros(shape, dtype=torch.float32, device=p.device)}
    dtype = _MOMENT_DTYPES[memory] if isinstance(p, PackedParameter) else torch.float32
    return {name: ops.new_moment(grad.shape, dtype, grad.device) for name in ("exp_avg_s", "exp_avg_l")}


def _is_channel_matrix(p: Tensor, memory: str) -> bool:
    """Whether a float parameter has one second moment an output channel, and no first."""
    return memory == "channel" and p.dim() >= 2 and p.numel() >= 4096


def _galore_options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("update_proj_gap", "scale", "proj_type") if key in group}


def _check_group(group: dict[str, Any]) -> None:
    betas, memory = group["betas"], group["memory"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"betas must be two numbers, (beta1, beta2), got {betas!r}.")
    beta1, beta2 = betas
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}.")
        if math.isinf(group[name]):
            raise ValueError(f"{name} must be finite, got {group[name]}.")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be at least 0 and below 1, got {(beta1, beta2)}.")
    if memory not in _MOMENT_DTYPES:
        raise ValueError(f"memory must be one of {', '.join(_MOMENT_DTYPES)}, got {memory!r}.")
    if not isinstance(group["dtype"], torch.dtype) or not group["dtype"].is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {group['dtype']}.")
    if "rank" in group:
        GaLoreProjector(group["rank"], **_galore_options(group))  # raises where it cannot be
    if memory == "channel" and "rank" in group:
        raise ValueError("memory='channel' needs the gradient of every channel and cannot go with GaLore's rank.")
