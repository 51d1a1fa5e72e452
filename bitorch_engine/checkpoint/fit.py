"""Whether a stored model is one of a given model, and how it gets in: all is checked first, then all is changed."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bitorch_engine.checkpoint.format import CheckpointError, dtype_name
from bitorch_engine.checkpoint.stored_model import StoredModel, WeightSettings, identity, refuse_without_values
from bitorch_engine.convert.replaced import replace_
from bitorch_engine.convert.swap import LOW_BIT, use_layers_, why_not
from bitorch_engine.layers.low_bit import LowBitLayer, transposed_groups
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.quantizers.activation import ActivationQuantizer

_REBUILD = "build the model as it was saved"


@dataclass(frozen=True)
class Fit:
    """A stored model that has been seen to fit a model, and what has to be done to get it in."""

    stored: StoredModel
    conversions: list[tuple[nn.Module, str, WeightSettings]]
    """Float layers that become low-bit, the name of their stored weight, and its settings."""

    def apply_(self, model: nn.Module) -> None:
        """Change the model."""
        made: dict[int, nn.Parameter] = {}
        olds = [layer.weight for layer, _, _ in self.conversions]
        for (layer, name, settings), old in zip(self.conversions, olds, strict=True):
            assert isinstance(old, nn.Parameter)
            low_bit = type(layer) if isinstance(layer, LowBitLayer) else LOW_BIT[type(layer)]
            if id(old) not in made:  # a weight that layers share stays shared
                fresh = self.stored[name].to(old.device, old.dtype, copy=True)
                made[id(old)] = low_bit.parameter_class(fresh, old.requires_grad)
            layer.__class__ = low_bit
            layer.weight = made[id(old)]
            layer.quantize_(settings.w_bit, settings.a_bit, settings.g_bit)  # type: ignore[operator]
            layer.weight = made[id(old)]
        use_layers_(model)
        state = model.state_dict()
        state.update({name: self.stored[name] for name in state.keys() & self.stored.names})
        model.load_state_dict(state)
        for old in olds:  # last: what went wrong before is undone, and the model has them again
            replace_(old)  # type: ignore[arg-type]


def fit(model: nn.Module, stored: StoredModel, *, training: bool, strict: bool = True) -> Fit:
    """Check that a stored model is one of ``model``. Raises CheckpointError where it is not.

    training: all that decides how training goes on must agree too, dtypes for one, and no layer is converted.
    strict: both have the same names. Otherwise only those that both have count.
    """
    entries = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    conversions: dict[int, tuple[nn.Module, str, WeightSettings]] = {}
    expected = set(entries)
    for name in [name for name in entries if name in stored.settings]:
        layer, settings = modules.get(name.rpartition(".")[0]), stored.settings[name]
        if not isinstance(entries[name], PackedParameter) and not training:
            _check_convertible(name, entries[name], layer, settings)
            assert layer is not None
            conversions[id(layer)] = layer, name, settings
            if settings.a_bit is not None:
                prefix = name.removesuffix("weight") + "activation."
                expected.update(ActivationQuantizer(settings.a_bit).state_dict(prefix=prefix))
        else:
            _check_packed(name, entries[name], layer, settings, training=training)
    if strict:
        _check_names(expected, stored.names, "" if training else ", or pass strict=False where that is meant")
    elif statistics := _statistics(expected ^ stored.names):
        warnings.warn(
            f"{_some(statistics)}: the model or the file alone has these. If the BatchNorm is folded in one of both, "
            "results will be wrong: fold the model with fuse_batch_norm_ if that was called before saving.",
            stacklevel=3,
        )
    for name in [name for name in entries if name in stored.names - stored.settings.keys()]:
        _check_plain(name, entries[name], stored[name], training=training)
    _check_shared(entries, stored)
    return Fit(stored, list(conversions.values()))


def _check_convertible(name: str, weight: Any, layer: nn.Module | None, settings: WeightSettings) -> None:
    of_layer = layer is not None and name.rpartition(".")[2] == "weight"
    reason = why_not(layer) if of_layer else "is not the weight of a layer"  # type: ignore[arg-type]
    if reason is not None:
        raise CheckpointError(
            f"{name} is stored with {settings.w_bit} bits, and what the model has there cannot be converted: "
            f"it {reason}; {_REBUILD}."
        )
    refuse_without_values(name, weight, CheckpointError)
    assert layer is not None
    _check_layout(name, settings, tuple(weight.shape), transposed_groups(layer))


def _check_packed(name: str, weight: Any, layer: nn.Module | None, settings: WeightSettings, *, training: bool) -> None:
    if not isinstance(weight, PackedParameter):
        raise CheckpointError(
            f"{name} is stored with {settings.w_bit} bits, the model's is float; convert it with quantize_, then make "
            "the optimizer, then load."
        )
    refuse_without_values(name, weight, CheckpointError)
    mine = WeightSettings.of(weight, layer)
    _check_layout(name, settings, mine.shape, mine.transposed_groups)
    exact = {field.name for field in fields(settings)} if training else {"w_bit", "a_bit"}
    for key in [field.name for field in fields(settings) if field.name in exact]:
        wanted, got = getattr(mine, key), getattr(settings, key)
        if wanted != got:
            raise CheckpointError(
                f"{name} is stored with {key}={got}, the model has {key}={wanted}; convert the model with {key}={got}"
                + ("." if training else ", or load into the float model, which is then converted as it was saved.")
            )


def _check_layout(name: str, settings: WeightSettings, shape: tuple[int, ...], groups: int) -> None:
    if settings.shape != shape:
        raise CheckpointError(f"{name} is stored with shape {settings.shape}, the model's has {shape}; {_REBUILD}.")
    if settings.transposed_groups != groups:
        raise CheckpointError(
            f"{name} is stored with the layout of a {_layout(settings.transposed_groups)}, the model's is of a "
            f"{_layout(groups)}; {_REBUILD}."
        )


def _layout(groups: int) -> str:
    return f"transposed convolution of groups={groups}" if groups else "layer that is not transposed"


def _check_plain(name: str, mine: Any, stored: Any, *, training: bool) -> None:
    if isinstance(mine, PackedParameter):
        raise CheckpointError(f"{name} is stored as {_show(stored)}, the model's has {mine.w_bit} bits; {_REBUILD}.")
    if not isinstance(mine, Tensor) or not isinstance(stored, Tensor):
        if isinstance(mine, Tensor) or isinstance(stored, Tensor):
            raise CheckpointError(f"{name} is stored as {_show(stored)}, wanted {_show(mine)}; {_REBUILD}.")
        return  # extra state, which only its module understands
    refuse_without_values(name, mine, CheckpointError)
    same_kind = mine.is_floating_point() and stored.is_floating_point() and not training
    if mine.shape != stored.shape or (mine.dtype != stored.dtype and not same_kind):
        raise CheckpointError(f"{name} is stored as {_show(stored)}, the model wants {_show(mine)}; {_REBUILD}.")


def _check_names(expected: set[str], stored: set[str], way_out: str) -> None:
    problems = {"lacks": expected - stored, "has, where the model has not,": stored - expected}
    if any(problems.values()):
        said = " and ".join(f"{verb} {_some(names)}" for verb, names in problems.items() if names)
        fold = ", with fuse_batch_norm_ if it was called then, and without if not"
        folds = fold if _statistics(expected ^ stored) else ""
        raise CheckpointError(f"the file {said}; {_REBUILD}{folds}{way_out}.")


def _statistics(names: set[str]) -> set[str]:
    """Those of BatchNorms: where a model or a file alone has them, a BatchNorm may be folded in the other."""
    return {name for name in names if name.rpartition(".")[2] == "running_var"}


def _check_shared(entries: dict[str, Any], stored: StoredModel) -> None:
    """A tensor that the model uses twice cannot take two values."""
    first: dict[Any, str] = {}
    for name in [name for name, value in entries.items() if isinstance(value, Tensor) and name in stored.names]:
        # Converted layers take packed weights of their own: those share among themselves.
        earlier = first.setdefault((identity(entries[name]), name in stored.settings), name)
        if not _equal(stored[earlier], stored[name]):
            raise CheckpointError(
                f"{earlier} and {name} are one tensor in the model, and two that differ in the file; {_REBUILD}."
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if isinstance(a, PackedParameter) and isinstance(b, PackedParameter):
        return a.w_bit == b.w_bit and _equal(a.packed, b.packed) and _equal(a.channel_scale, b.channel_scale)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)  # NaN equals NaN


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
