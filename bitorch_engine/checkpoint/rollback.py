"""All or nothing: whatever goes wrong while a checkpoint is put in place, everything is as it was before."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from bitorch_engine.parameters import PackedParameter


class Scheduler(Protocol):
    """What a checkpoint needs of a learning rate scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@contextmanager
def restored_on_error(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: Scheduler | None = None
) -> Iterator[None]:
    """Undo what the body did to model, optimizer, scheduler and random number generators where it raises.

    Checks come before changes, so this is for what no check foresees: hooks of other people's modules and optimizers,
    memory that runs out, Ctrl-C. It costs a copy of the model for as long as it lasts.
    """
    with ExitStack() as undo:
        undo.callback(_undo_model, *_copies(model))
        undo.callback(set_rng_state, rng_state())
        if optimizer is not None:
            # load_state_dict gives an optimizer new state and groups and leaves the old ones alone.
            undo.callback(_undo_attributes, optimizer, dict(vars(optimizer)))
        if scheduler is not None:
            undo.callback(scheduler.load_state_dict, deepcopy(scheduler.state_dict()))
            undo.callback(_undo_attributes, scheduler, dict(vars(scheduler)))
        yield
        undo.pop_all()


def rng_state() -> dict[str, Any]:
    """The states of the generators of torch (CPU, and CUDA where it is in use), Python and numpy."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    inner = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in numpy["state"].items()}
    state["numpy"] = numpy | {"state": inner}
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` gave; states of CUDA devices that are not there are left out."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    inner = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in state["numpy"]["state"].items()}
    np.random.set_state(state["numpy"] | {"state": inner})
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)


def _copies(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(modules, with their classes and attributes), (tensors, with their values)."""
    modules = [
        (module, type(module), {k: dict(v) if k in _TABLES else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    return modules, [(t, t.detach().clone()) for t in tensors if not nn.parameter.is_lazy(t)]


_TABLES = ("_parameters", "_buffers", "_modules")


@torch.no_grad()
def _undo_model(modules: list[Any], tensors: list[Any]) -> None:
    for module, kind, attributes in modules:
        module.__class__ = kind
        _undo_attributes(module, attributes)
    for tensor, before in tensors:
        if isinstance(tensor, PackedParameter):
            tensor._adopt_(before)
        else:
            tensor.copy_(before)


def _undo_attributes(owner: Any, attributes: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(attributes)
