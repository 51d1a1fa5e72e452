"""Training checkpoints: all that a training run is made of, so that it goes on as if it had never stopped."""

from typing import Any

import torch
from torch import nn

from bitorch_engine.checkpoint.deployment import library_version
from bitorch_engine.checkpoint.fit import fit
from bitorch_engine.checkpoint.format import CheckpointError, StrPath, explained, naming, read, write
from bitorch_engine.checkpoint.rollback import Scheduler, restored_on_error, rng_state, set_rng_state
from bitorch_engine.checkpoint.stored_model import StoredModel, bare, encode_model
from bitorch_engine.checkpoint.structure import decode, encode

KIND = "training"

_REBUILD = "make the optimizer as the saved one, after the model was converted"


def save_training(
    path: StrPath,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Write a training run to one safetensors file, from which ``load_training`` goes on bit for bit.

    It holds the model with the training state of its packed weights (residual, noise counters, moments of scales), the
    state_dicts of optimizer and scheduler, and the random number generators of torch (CPU, and CUDA in use), Python and
    numpy. Gradients are not in it: save between steps. The file replaces an earlier one in one step.
    progress: what else is needed, the epoch for one: tensors, numbers, strings, and lists, tuples and dicts of them.
    Raises TypeError, naming it, for state that the file cannot hold, such as functions; OSError where it cannot be
    written.
    """
    model = bare(model)
    content, tensors = encode_model(model, training=True)
    content |= {"library_version": library_version(), "torch_version": str(torch.__version__)}
    content["optimizer"] = content["scheduler"] = None
    if optimizer is not None:
        state = encode(optimizer.state_dict(), "optimizer", tensors)
        content["optimizer"] = {"type": _kind(optimizer), "parameters": _parameters(optimizer, model), "state": state}
    if scheduler is not None:
        content["scheduler"] = {"type": _kind(scheduler), "state": encode(scheduler.state_dict(), "scheduler", tensors)}
    content["rng"] = encode(rng_state(), "rng", tensors)
    content["progress"] = encode(progress or {}, "progress", tensors)
    write(path, KIND, content, tensors)


def load_training(
    path: StrPath,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
) -> dict[str, Any]:
    """Put a training run back as ``save_training`` found it, in place, and return its ``progress``.

    model: built and converted as the saved one, on any device.
    optimizer, scheduler: made as the saved ones, of the same class and over the same parameters in the same order. One
    that is None is passed over.
    Everything is checked before anything is changed: CheckpointError is raised for a file that is damaged, of another
    format, or not of this run, and OSError for one that cannot be read. Model, optimizer, scheduler and random number
    generators are then as they were.
    """
    model = bare(model)
    with naming(path, "Nothing was changed."):
        content, tensors = read(path, KIND)
        stored = StoredModel.decode(content, tensors, "model.")
        with explained("its training state makes no sense", "save it again with this library"):
            states = {
                part: content[part] and decode(content[part]["state"], tensors) for part in ("optimizer", "scheduler")
            }
            rng, progress = decode(content["rng"], tensors), decode(content["progress"], tensors)
            _check_part("optimizer", optimizer, content["optimizer"])
            _check_part("scheduler", scheduler, content["scheduler"])
        plan = fit(model, stored, training=True)
        with explained("its parameters make no sense", "save it again with this library"):
            if optimizer is not None:
                _check_parameters(_parameters(optimizer, model), content["optimizer"]["parameters"])
        with (
            explained("model, optimizer or scheduler do not take it", "make them as they were saved"),
            restored_on_error(model, optimizer, scheduler),
        ):
            plan.apply_(model)
            if optimizer is not None:
                optimizer.load_state_dict(states["optimizer"])
            if scheduler is not None:
                scheduler.load_state_dict(states["scheduler"])
            set_rng_state(rng)
    return progress


def _kind(part: Any) -> str:
    return type(part).__name__


def _parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str | None]]:
    """The names of the parameters of each group; None for those that are not the model's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def _check_part(part: str, mine: Any, stored: dict[str, Any] | None) -> None:
    if mine is None:
        return
    if stored is None:
        raise CheckpointError(f"there is no {part} in it; pass {part}=None, or a file that was saved with one.")
    if _kind(mine) != stored["type"]:
        raise CheckpointError(
            f"the file has the {part} {stored['type']}, got {_kind(mine)}; make the one that was saved."
        )


def _check_parameters(mine: list[list[str | None]], stored: list[list[str | None]]) -> None:
    sizes, stored_sizes = [len(group) for group in mine], [len(group) for group in stored]
    if sizes != stored_sizes:
        raise CheckpointError(f"the file's optimizer has groups of {stored_sizes} parameters, got {sizes}; {_REBUILD}.")
    for group, (names, stored_names) in enumerate(zip(mine, stored, strict=True)):
        for name, stored_name in zip(names, stored_names, strict=True):
            if name != stored_name:
                raise CheckpointError(
                    f"the file's optimizer has {stored_name} in group {group} where this one has "
                    f"{name or 'a parameter that is not of the model'}; {_REBUILD}."
                )
