"""What a file holds of a model, and how it is written and read.

Every entry of the model's state_dict is in the file under its name (after a prefix in training checkpoints). A packed
weight is two tensors, ``<name>.packed`` and ``<name>.scale``, and in training checkpoints more, its training state. The
content says the rest:

    weights   {name: settings of the packed weight and of its layer}
    same      {name: the name under which this tensor, used twice, is stored}
    extra     {name: what get_extra_state of a module gave}
    training  {name: training state of the packed weight}                        (training checkpoints)
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from bitorch_engine.bits import bit_format, packed_size
from bitorch_engine.checkpoint.format import dtype_name, dtype_named, explained
from bitorch_engine.checkpoint.structure import decode, encode
from bitorch_engine.parameters import PackedParameter


@dataclass(frozen=True)
class WeightSettings:
    """What is to be known of a packed weight, and of the layer that it belongs to, besides its tensors."""

    shape: tuple[int, ...]
    w_bit: int
    dtype: str
    transposed_groups: int
    learn_scale: bool
    a_bit: int | None
    g_bit: int | None

    @classmethod
    def of(cls, weight: PackedParameter, layer: nn.Module | None) -> "WeightSettings":
        return cls(
            tuple(weight.shape),
            weight.w_bit,
            dtype_name(weight.dtype),
            weight.transposed_groups,
            weight.learn_scale,
            getattr(layer, "a_bit", None),
            getattr(layer, "g_bit", None),
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "WeightSettings":
        """Raises TypeError or ValueError where a value is not what it should be."""
        settings = cls(**stored | {"shape": tuple(stored["shape"])})
        for bits in (settings.w_bit, settings.a_bit, settings.g_bit):
            if bits is not None:
                bit_format(bits)
        if not dtype_named(settings.dtype).is_floating_point:
            raise ValueError(f"a weight of dtype {settings.dtype}")
        return settings

    @property
    def rows(self) -> int:
        """Output channels, each with a scale."""
        return self.transposed_groups * self.shape[1] if self.transposed_groups else self.shape[0]

    def parameter(self, packed: Tensor, scale: Tensor) -> PackedParameter:
        """The weight with these settings. Raises ValueError where the tensors do not belong to it."""
        wanted = (packed_size(prod(self.shape), self.w_bit),), (self.rows,)
        if (packed.shape, scale.shape) != wanted or (packed.dtype, scale.dtype) != (torch.uint8, torch.float32):
            raise ValueError(f"codes and scale have sizes {tuple(packed.shape)}, {tuple(scale.shape)}, not {wanted}")
        context = {key: getattr(self, key) for key in ("w_bit", "transposed_groups", "learn_scale")}
        context["dtype"] = dtype_named(self.dtype)
        inner = {"packed": packed, "channel_scale": scale}
        weight = PackedParameter.__tensor_unflatten__(inner, context, torch.Size(self.shape), None)
        assert isinstance(weight, PackedParameter)
        return weight


@dataclass(frozen=True)
class StoredModel:
    """The model's part of a file. values: by the names of the state_dict, each tensor once, on the CPU."""

    values: dict[str, Any]
    settings: dict[str, WeightSettings]
    same: dict[str, str]

    @property
    def names(self) -> set[str]:
        return self.values.keys() | self.same.keys()

    def __getitem__(self, name: str) -> Any:
        return self.values[self.same.get(name, name)]

    @classmethod
    def decode(cls, content: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> "StoredModel":
        """The model in contents that were read. Raises CheckpointError where they do not fit together."""
        with explained("what it says of its model makes no sense", "save it again with this library"):
            settings = {name: WeightSettings.from_json(stored) for name, stored in content["weights"].items()}
            same: dict[str, str] = content["same"]
            states: dict[str, Any] = content.get("training", {})
            values = {name: decode(form, tensors) for name, form in content["extra"].items()}
            used = set()
            for name in settings.keys() - same.keys():
                packed, scale = used_here = [f"{prefix}{name}.packed", f"{prefix}{name}.scale"]
                values[name] = settings[name].parameter(tensors[packed], tensors[scale])
                if name in states:
                    values[name].load_training_state_(decode(states[name], tensors))
                used.update(used_here)
            used.update(_tensor_names([*content["extra"].values(), *states.values()]))
            for name in tensors.keys() - used:
                if name.startswith(prefix):
                    values[name.removeprefix(prefix)] = tensors[name]
            if unknown := set(same.values()) - values.keys():
                raise ValueError(f"nothing is stored as {sorted(unknown)[0]}")
        return cls(values, settings, same)


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile and of data parallelism, which put prefixes before all names.

    Raises TypeError for what is no model: some functions have the path first, as others have the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}: save(model, path), load(model, path), "
            "save_training(path, model, optimizer), load_training(path, model, optimizer)."
        )
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def encode_model(model: nn.Module, *, training: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content, tensors) that hold the model, with all that training needs or without.

    Raises TypeError for state that a checkpoint cannot hold, ValueError where two of its names are one.
    """
    prefix = "model." if training else ""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, Tensor] = {}
    settings: dict[str, WeightSettings] = {}
    same: dict[str, str] = {}
    others: dict[str, Any] = {}
    states: dict[str, Any] = {}
    first: dict[Any, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, PackedParameter):
            settings[name] = WeightSettings.of(value, modules.get(name.rpartition(".")[0]))
        elif not isinstance(value, Tensor):
            others[name] = value
            continue
        refuse_without_values(name, value, ValueError)
        if (earlier := first.setdefault(identity(value), name)) != name:
            same[name] = earlier
        elif isinstance(value, PackedParameter):
            _put(tensors, f"{prefix}{name}.packed", value.packed)
            _put(tensors, f"{prefix}{name}.scale", value.channel_scale)
            states[name] = value.training_state()
        else:
            _put(tensors, f"{prefix}{name}", value)
    extra = {name: encode(value, f"{prefix}{name}", tensors) for name, value in others.items()}
    content = {"weights": {name: asdict(s) for name, s in settings.items()}, "same": same, "extra": extra}
    if training:
        content["training"] = {name: encode(state, f"{prefix}{name}", tensors) for name, state in states.items()}
    return content, tensors


def identity(value: Tensor) -> Any:
    """What is equal for two tensors that are the same one: the object, or another view of the very same memory."""
    if isinstance(value, PackedParameter) or not value.numel():
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


def refuse_without_values(name: str, value: Tensor, error: type[ValueError]) -> None:
    """Raise ``error`` for a tensor that is lazy or on the meta device."""
    if nn.parameter.is_lazy(value):
        raise error(f"{name} has no shape yet; run one batch through the model first.")
    if value.is_meta:
        raise error(f"{name} is on the meta device, without memory; call model.to_empty(device=...) first.")


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors or name == "__metadata__":
        raise ValueError(f"two tensors of the model would be stored as {name}; rename one of them.")
    tensors[name] = tensor


def _tensor_names(form: Any) -> Iterable[str]:
    """The names that an encoded structure refers to."""
    if isinstance(form, dict):
        if form.keys() == {"tensor"}:
            yield form["tensor"][0]
            return
        form = list(form.values())
    if isinstance(form, list):
        for item in form:
            yield from _tensor_names(item)
