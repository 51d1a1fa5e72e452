"""Folding BatchNorm into the layer before it, for inference: one layer is left of two, with the codes that it had.

A packed weight is codes times a scale an output channel. What BatchNorm does in evaluation, ``factor * y + shift`` with
one of each a channel, goes to the scales and to the bias. A scale may thereby become negative, or 0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bitorch_engine import ops
from bitorch_engine.convert.swap import LOW_BIT
from bitorch_engine.layers.low_bit import LowBitLayer, transposed_groups
from bitorch_engine.parameters import PackedParameter

_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
"""How many dimensions the input of a BatchNorm can have."""


@dataclass(frozen=True)
class NormReport:
    """What became of one BatchNorm. layer: which one took it.  kept: why it stayed; one of the two is None."""

    name: str
    kind: str
    layer: str | None = None
    kept: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """What ``fuse_batch_norm_`` did: one entry a BatchNorm, in the model's order. ``str()`` gives a table."""

    norms: list[NormReport] = field(default_factory=list)

    @property
    def fused(self) -> list[NormReport]:
        return [norm for norm in self.norms if norm.kept is None]

    @property
    def kept(self) -> list[NormReport]:
        return [norm for norm in self.norms if norm.kept is not None]

    def __str__(self) -> str:
        names, kinds = ([getattr(norm, key) for norm in self.norms] for key in ("name", "kind"))
        name_width, kind_width = (max(map(len, column), default=0) for column in (names, kinds))
        lines = [
            f"{norm.name:{name_width}}  {norm.kind:{kind_width}}  "
            + (f"into {norm.layer}" if norm.kept is None else f"kept: {norm.kept}")
            for norm in self.norms
        ]
        return "\n".join([*lines, f"{len(self.fused)} folded, {len(self.kept)} kept"])


class FoldedBatchNorm(nn.Identity):
    """Stands for a folded BatchNorm that takes inputs of several ranks, and gives back its input.

    With another rank than the one here, BatchNorm would not have normalized the channels of the layer before: an error.
    """

    def __init__(self, dimensions: int, name: str) -> None:
        super().__init__()
        self.dimensions, self.name = dimensions, name

    def forward(self, input: Tensor) -> Tensor:
        # torch._assert, unlike raise, can be traced by torch.fx.
        torch._assert(
            input.dim() == self.dimensions,
            f"the BatchNorm {self.name!r} was folded into the layer before it, for inputs of {self.dimensions} "
            "dimensions. Do not fold it for a model that gives it others: fuse_batch_norm_(model, pairs=[...]) folds "
            "only those BatchNorms that it names.",
        )
        return input


def fuse_batch_norm_(model: nn.Module, *, pairs: Iterable[tuple[str, str]] | None = None) -> FusionReport:
    """Fold each BatchNorm of a model in evaluation into the convolution or linear layer before it, in place.

    Codes of packed weights stay as they are, bit for bit: ``channel_scale`` is multiplied, and may become negative.
    torch.nn's layers are folded too. A folded BatchNorm becomes an ``nn.Identity``, so that all other names stay; its
    layer has a bias from then on. Outputs are the same but for rounding. It is for inference: what trains after this
    trains without BatchNorm. To ``load`` a file of a folded model, fold the model that it is loaded into.

    A pair is folded only where it is certain that nothing else gets the layer's output or calls one of both; torch.fx
    finds that out. Every other BatchNorm stays, and the report says why.
    pairs: names of layers and of the BatchNorms after them, ``[("conv1", "bn1")]``, for models that torch.fx cannot
        trace. These alone are folded. That the layer's output goes there, and nowhere else, is the caller's word.
    Raises ValueError for a model in training mode, for one that cannot be traced, for pairs that cannot be folded, and
    for statistics that are not finite. The model is unchanged then.
    """
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(
            f"{training[0] or 'the model'!r} is in training mode, where BatchNorm depends on the batch; call "
            "model.eval() first."
        )
    reports = _traced(model) if pairs is None else _named(model, list(pairs))
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    with torch.no_grad():
        folds = []
        for report in reports:
            if report.layer is not None:
                layer, norm = modules[report.layer], modules[report.name]
                factor, bias = _factor_and_bias(layer, norm)
                if not bool((torch.isfinite(factor) & torch.isfinite(bias)).all()):
                    raise ValueError(
                        f"{report.name!r} has statistics or weights that are not finite; nothing was folded."
                    )
                folds.append((layer, norm, factor, bias))
        for layer, norm, factor, bias in folds:
            _fold_(layer, factor, bias)
            _replace_(model, norm, _stand_in(layer, norm, names[norm]))
    return FusionReport(reports)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which looks into no low-bit layer, as it looks into none of torch.nn's."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LowBitLayer) or super().is_leaf_module(module, name)


def _traced(model: nn.Module) -> list[NormReport]:
    """What can be folded by what the model's forward does with the outputs of its modules."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a forward may raise that is called with symbols
        raise ValueError(
            f"torch.fx cannot trace the model ({type(error).__name__}: {error}), so that it is not certain which "
            "BatchNorm gets the output of which layer. Name the pairs: fuse_batch_norm_(model, pairs=[('conv1', "
            "'bn1'), ...]). Nothing was folded."
        ) from error
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {name: [] for name in modules}
    read = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])
    owners = _owners(model)
    reports = []
    for name, norm in modules.items():
        if isinstance(norm, _BatchNorm):
            layer, kept = _layer_before(name, modules, calls, read)
            if layer is not None:
                kept = _why_not(modules[layer], norm, owners)
            reports.append(NormReport(name, type(norm).__name__, None if kept else layer, kept))
    return reports


def _layer_before(
    name: str, modules: Mapping[str, nn.Module], calls: Mapping[str, list[fx.Node]], read: set[str]
) -> tuple[str | None, str | None]:
    """The layer whose output goes to that BatchNorm and nowhere else; or None, and the reason."""
    if len(calls[name]) != 1:
        return None, f"is called {len(calls[name])} times" if calls[name] else "is not called by itself"
    inputs = calls[name][0].all_input_nodes
    layer = str(inputs[0].target) if len(inputs) == 1 and inputs[0].op == "call_module" else None
    if layer is None or not isinstance(modules[layer], (*LOW_BIT, LowBitLayer)):
        return None, "does not directly follow a convolution or linear layer"
    if len(inputs[0].users) > 1:
        return None, f"the output of {layer} is used elsewhere too"
    if len(calls[layer]) > 1:
        return None, f"{layer} is called {len(calls[layer])} times"
    for one in (name, layer):
        if one in read:
            return None, f"tensors of {one} are used elsewhere too"
    return layer, None


def _named(model: nn.Module, pairs: list[tuple[str, str]]) -> list[NormReport]:
    """What is to be folded by the caller's word. Raises ValueError for a pair that cannot be."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(model)
    layers: dict[nn.Module, str] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs must be a list of pairs of names, [('conv1', 'bn1'), ...]; {pair!r} is no pair.")
        if unknown := [name for name in pair if name not in modules]:
            raise ValueError(f"{unknown[0]!r} is no module of the model; pairs are names of a layer and a BatchNorm.")
        layer, norm = (modules[name] for name in pair)
        if reason := _why_not(layer, norm, owners):
            raise ValueError(f"{pair} cannot be folded: {reason}. Nothing was folded.")
        if norm in layers or names[layer] in layers.values():
            raise ValueError(f"{pair} names what another pair has; a layer and a BatchNorm are folded once.")
        layers[norm] = names[layer]
    return [
        NormReport(name, type(norm).__name__, layers.get(norm), None if norm in layers else "is not among the pairs")
        for norm, name in names.items()
        if isinstance(norm, _BatchNorm)
    ]


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules have a parameter, by its id."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def _why_not(layer: nn.Module, norm: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Why a BatchNorm cannot be folded into a layer whose output it alone gets, or None where it can."""
    if not isinstance(layer, (*LOW_BIT, LowBitLayer)):
        return f"a {type(layer).__name__} is neither a convolution nor a linear layer"
    if not isinstance(norm, _BatchNorm):
        return f"a {type(norm).__name__} is no BatchNorm"
    if _has_own_code(layer) or type(norm) not in _DIMENSIONS or "forward" in vars(norm):
        return f"{type(layer).__name__} or {type(norm).__name__} is a subclass with its own code"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics (track_running_stats=False)"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm)):
        return "it or the layer before it has forward hooks"
    if "weight" not in layer._parameters:
        return "the weight of the layer before it is computed, not a parameter"
    if owners[id(layer.weight)] > 1:
        return "the layer before it shares its weight"
    if _dimensions(layer) not in _DIMENSIONS[type(norm)] or norm.num_features != _output_channels(layer):
        return f"it does not take the {_output_channels(layer)} channels that the {type(layer).__name__} gives"
    return None


def _has_own_code(layer: nn.Module) -> bool:
    if "forward" in vars(layer):
        return True
    if isinstance(layer, LowBitLayer):
        return type(layer).forward not in [kind.forward for kind in LOW_BIT.values()]
    return type(layer) not in LOW_BIT


def _dimensions(layer: nn.Module) -> int:
    """Of the output for a batch."""
    return 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)  # type: ignore[arg-type]


def _output_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _factor_and_bias(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What to multiply the output channels by, and the bias after that: float32 or wider, on the layer's device."""
    weight: Tensor = layer.weight  # type: ignore[assignment]

    def wide(values: Any) -> Any:
        if values is None:
            return None
        return values.to(weight.device, torch.promote_types(values.dtype, torch.float32))

    mean, variance, gamma, beta, bias = (
        wide(values) for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias, layer.bias)
    )
    ones = torch.ones_like(mean)[:, None]
    factor, bias = fuse_conv_bn_weights(ones, bias, mean, variance, float(norm.eps), gamma, beta)  # type: ignore[arg-type]
    return factor[:, 0], bias


def _fold_(layer: nn.Module, factor: Tensor, bias: Tensor) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(weight, PackedParameter):
        weight.multiply_channels_(factor)
    else:
        groups = transposed_groups(layer)
        geometry = ops.Convolution((), (), (), groups > 0, (), max(1, groups))
        folded = weight * geometry.per_output_channel(factor, weight.shape)
        # The memory of the old one may be another layer's too.
        layer.weight = nn.Parameter(folded.to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)


def _stand_in(layer: nn.Module, norm: nn.Module, name: str) -> nn.Module:
    dimensions = _dimensions(layer)
    stand_in = nn.Identity() if _DIMENSIONS[type(norm)] == (dimensions,) else FoldedBatchNorm(dimensions, name)
    return stand_in.eval()


def _replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module where another one is, under each of its names."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                setattr(module, name, new)
