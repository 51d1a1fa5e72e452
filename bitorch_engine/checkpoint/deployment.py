"""Deployment files: a model as it is shipped, its packed weights at their n bits, without training state."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from bitorch_engine.checkpoint.fit import fit
from bitorch_engine.checkpoint.format import (
    VERSIONS,
    StrPath,
    explained,
    naming,
    read,
    read_content,
    write,
)
from bitorch_engine.checkpoint.rollback import restored_on_error
from bitorch_engine.checkpoint.stored_model import StoredModel, bare, encode_model

KIND = "deployment"


def save(model: nn.Module, path: StrPath, *, metadata: dict[str, Any] | None = None) -> None:
    """Write a model's parameters and buffers to a safetensors file, packed weights as codes and scales.

    The file replaces an earlier one in one step; a failure leaves the earlier one. Equal models give equal files.
    The classes of the modules are not in it: ``load`` needs the model, float or converted. Names are those of the model
    inside of torch.compile's or DistributedDataParallel's.
    metadata: what ``read_metadata`` is to give back: a dict that JSON keeps as it is, with the model's name for one.
    Raises TypeError for metadata or state that the file cannot hold, OSError where it cannot be written.
    """
    content, tensors = encode_model(bare(model), training=False)
    content |= {"library_version": library_version(), "metadata": _checked(metadata or {})}
    write(path, KIND, content, tensors)


def load(model: nn.Module, path: StrPath, *, strict: bool = True) -> dict[str, Any]:
    """Load a file of ``save`` into a model, in place, and return what ``read_metadata`` gives.

    Layers of the model that are still float become low-bit as they were when saved; make optimizers afterwards.
    All outputs are then bit for bit those of the saved model, where the dtypes are the same: a model of another float
    dtype keeps its own. Parameters keep their device; layers that are low-bit already keep g_bit and learn_scale, which
    are for training. Training state of packed weights is dropped.
    strict: raise where a name is missing or unexpected; False loads the names that both have, and warns where a
        BatchNorm is in one of both only, which may be folded in the other.
    Runs no code from the file. Every bit is checked, and so is whether all fits, before anything is changed: for a file
    that is damaged, of another format or version, or not of this model, CheckpointError is raised, OSError for one that
    cannot be read, and the model is as it was.
    """
    model = bare(model)
    with naming(path, "The model is unchanged."):
        content, tensors = read(path, KIND)
        stored = StoredModel.decode(content, tensors)
        metadata = _described(KIND, content)
        plan = fit(model, stored, training=False, strict=strict)
        with explained("the model does not take it", "build the model as it was saved"), restored_on_error(model):
            plan.apply_(model)
    return metadata


def read_metadata(path: StrPath) -> dict[str, Any]:
    """What a file of ``save`` or ``save_training`` says about itself, read from its first few kilobytes.

    kind: "deployment" or "training".  format_version, library_version: those that wrote it.
    weights: of each packed weight, by name, shape, w_bit, dtype, transposed_groups, learn_scale, a_bit and g_bit.
    metadata: what ``save`` was given.
    All of this is checked against its digest, and the file for its length. The tensors are not read; ``load`` checks
    them.
    Raises CheckpointError, OSError as ``load``.
    """
    with naming(path):
        return _described(*read_content(path))


def library_version() -> str:
    """The version of bitorch_engine that is installed."""
    try:
        return version("bitorch_engine")
    except PackageNotFoundError:
        return "unknown"


def _described(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    with explained("its description is incomplete", "save it again with this library"):
        return {
            "kind": kind,
            "format_version": VERSIONS[kind],
            "library_version": content["library_version"],
            "weights": {
                name: weight | {"shape": tuple(weight["shape"])} for name, weight in content["weights"].items()
            },
            "metadata": content.get("metadata", {}),
        }


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, seen to come back from JSON as it is."""
    try:
        same = isinstance(metadata, dict) and json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be a dict that JSON can hold: {error}.") from None
    if not same:
        raise TypeError("metadata must be a dict that JSON keeps as it is: keys are str, sequences are lists.")
    return metadata
