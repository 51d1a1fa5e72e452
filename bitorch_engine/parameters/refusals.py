"""What torch's optimizers cannot do with packed weights is refused before a step begins."""

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bitorch_engine.parameters.packed import PackedParameter


def refuse_multi_tensor_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise NotImplementedError for foreach=True or fused=True with a packed weight.

    Both write lists of tensors through their memory. The operators refuse that too, but by then the optimizer has
    advanced its state.
    """
    for group in optimizer.param_groups:
        asked = next((name for name in ("foreach", "fused") if group.get(name)), None)
        if asked and any(isinstance(p, PackedParameter) for p in group["params"]):
            raise NotImplementedError(
                f"{type(optimizer).__name__}({asked}=True) is not supported for packed weights; pass foreach=False and "
                "fused=False, or use bitorch_engine.optim.DiodeMix. Nothing was changed."
            )


def refuse_lbfgs(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise NotImplementedError for LBFGS with a packed weight.

    It takes the curvature from what small moves change; those are rounded stochastically here, so that it diverges.
    """
    if not isinstance(optimizer, torch.optim.LBFGS):
        return
    if any(isinstance(p, PackedParameter) for group in optimizer.param_groups for p in group["params"]):
        raise NotImplementedError(
            f"packed weights need a first-order optimizer, got {type(optimizer).__name__}: it diverges where weights "
            "are rounded; use bitorch_engine.optim.DiodeMix, or torch.optim's AdamW or SGD. Nothing was changed."
        )


register_optimizer_step_pre_hook(refuse_multi_tensor_step)
register_optimizer_step_pre_hook(refuse_lbfgs)
