"""Converting a model: every layer that can be low-bit becomes it, and a report says what happened to each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bitorch_engine.bits import has_values
from bitorch_engine.convert.swap import convert_layer_, use_layers_, why_not
from bitorch_engine.layers.low_bit import LowBitLayer, check_bits
from bitorch_engine.parameters import PackedParameter


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. ``skipped`` is the reason why it stayed as it was, or None."""

    name: str
    kind: str
    weights: int
    bytes_before: int
    bytes_after: int
    w_bit: int | None = None
    a_bit: int | None = None
    g_bit: int | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What ``quantize_`` did: one entry a layer with a weight, in the model's order. ``str()`` gives a table.

    Bytes are those of the weights as deployed: codes and scales, without training state.
    """

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def converted(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is not None]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "kind", "w", "a", "g", "bytes before", "after", "")
        rows = [
            (
                layer.name or "(root)",
                layer.kind,
                *("-" if bits is None else str(bits) for bits in (layer.w_bit, layer.a_bit, layer.g_bit)),
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
                f"skipped: {layer.skipped}" if layer.skipped else "",
            )
            for layer in self.layers
        ]
        total = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        rows.append(("total", total, "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", ""))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = []
        for row in [head, *rows]:
            cells = [
                c.rjust(w) if 2 <= i <= 6 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    w_bit: int = 4,
    a_bit: int | None = None,
    g_bit: int | None = None,
    *,
    skip: str | Iterable[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    learn_scale: bool = False,
) -> ConversionReport:
    """Convert the convolutions and linear layers of a model to ``w_bit`` bits, in place; it may be one itself.

    All of them, the first and the last too, which are the most sensitive to few bits: ``overrides={"conv1": {"w_bit":
    8}}`` and ``skip="fc"`` treat them better. Weights are quantized to their nearest codes; biases, normalization
    layers and all else are untouched. Modules stay the same objects (hooks, references and names stay valid); a weight
    that is shared stays shared, and stays float where one of those who share it cannot be converted (an embedding).
    A layer that is low-bit already keeps its bits, whatever is asked for now; the report says so. To change them, load
    the float model again. One whose weight was replaced by a float one is converted again, to the bits that it had.
    Make the optimizer afterwards: weights are new parameters, and one that holds the old ones raises RuntimeError when
    it is used.

    w_bit, a_bit, g_bit, learn_scale: as for ``nBitConv2d`` and ``nBitLinear``.
    skip: names, or patterns such as ``"layer4.*"`` (fnmatch), of modules to leave as they are.
    overrides: settings for modules by name or pattern, ``{"conv1": {"w_bit": 8, "a_bit": None}}``. The last one wins.
    Raises ValueError for bits that do not exist, and for a pattern that matches nothing (for overrides: no layer that
    can be converted); the model is unchanged then.
    """
    skip = [skip] if isinstance(skip, str) else list(skip)
    overrides = dict(overrides or {})
    defaults = {"w_bit": w_bit, "a_bit": a_bit, "g_bit": g_bit, "learn_scale": learn_scale}
    for override in ({}, *overrides.values()):
        if not isinstance(override, Mapping):
            raise TypeError(f'overrides maps names to settings such as {{"w_bit": 8}}, got {override!r}.')
        if unknown := override.keys() - defaults.keys():
            raise ValueError(f"overrides may set {', '.join(defaults)}, got {', '.join(sorted(unknown))}.")
        settings = {**defaults, **override}
        check_bits(settings["w_bit"], settings["a_bit"], settings["g_bit"])

    layers = {
        name: (module, weight) for name, module in model.named_modules() if (weight := _weight(module)) is not None
    }
    convertible = [name for name, (module, _) in layers.items() if why_not(module) is None]
    names = [name for name, _ in model.named_modules()]
    for pattern, candidates in [*((p, names) for p in skip), *((p, convertible) for p in overrides)]:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(f"{pattern!r} matches no layer; to convert there are {', '.join(map(repr, convertible))}.")
    reasons = {name: "as asked" if _inside(name, skip) else why_not(module) for name, (module, _) in layers.items()}
    _keep_shared(model, layers, reasons)
    for name, (_, weight) in layers.items():
        if reasons[name] is None and has_values(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"the weight of {name or 'the model'!r} has NaN or Inf entries; nothing was converted.")

    report = ConversionReport()
    shared: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for name, (module, weight) in layers.items():
        lazy = isinstance(weight, nn.UninitializedParameter)
        count, size = (0, 0) if lazy else (weight.numel(), _deployed_bytes(weight))
        entry = LayerReport(name, type(module).__name__, count, size, size, skipped=reasons[name])
        if isinstance(module, LowBitLayer) and module.is_packed:
            entry = replace(entry, **_bits(module))
        if entry.skipped is None:
            settings = dict(defaults)
            for pattern, override in overrides.items():
                if fnmatchcase(name, pattern):
                    settings |= override
            convert_layer_(module, **settings)
            if id(weight) in shared:
                module.weight = shared[id(weight)][1]
            shared[id(weight)] = weight, module.weight
            assert isinstance(module, LowBitLayer)
            entry = replace(entry, bytes_after=_deployed_bytes(module.weight), **_bits(module))
        report.layers.append(entry)
    use_layers_(model)
    return report


def _keep_shared(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, Tensor]], reasons: dict[str, str | None]
) -> None:
    """Give a reason to each layer whose weight is also the parameter of something that is not converted."""
    kept: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if key != "weight" or name not in layers or reasons[name] is not None:
                kept.setdefault(id(parameter), f"{name}.{key}" if name else key)
    for name, (_, weight) in layers.items():
        if reasons[name] is None and id(weight) in kept:
            reasons[name] = f"shares its weight with {kept[id(weight)]}, which stays as it is"


def _bits(layer: LowBitLayer) -> dict[str, Any]:
    return {"w_bit": layer.w_bit, "a_bit": layer.a_bit, "g_bit": layer.g_bit}


def _deployed_bytes(weight: Tensor) -> int:
    if isinstance(weight, PackedParameter):
        return weight.packed.nbytes + weight.channel_scale.nbytes
    return weight.nbytes


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer that has one of two or more dimensions, or none yet."""
    weight = getattr(module, "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight", None)
    if isinstance(weight, nn.UninitializedParameter):
        return weight
    return weight if isinstance(weight, Tensor) and weight.dim() >= 2 else None


def _inside(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches the module or one that holds it."""
    parts = name.split(".")
    holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(holder, pattern) for holder in holders for pattern in patterns)
