"""A network on its way into a file and back: how it is converted, what the file says about it, how it is rebuilt."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from bitorch_engine.checkpoint import load, read_metadata, save
from bitorch_engine.cli.data import ImageData
from bitorch_engine.cli.errors import RunError, UsageError
from bitorch_engine.cli.models import BUILTIN, build_model
from bitorch_engine.cli.run_folder import RunFolder, Settings
from bitorch_engine.convert import quantize_

CONVERTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FIRST_A_BIT = 8


@dataclass(frozen=True)
class Card:
    """What the file of a model says about it: enough to rebuild and test it."""

    model: str
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    data: str
    image_size: int | None


def convert(model: nn.Module, settings: Settings) -> None:
    """Convert the model's convolutions and linear layers in place.

    The first one sees the image itself, where bits are dear and weights few: it takes ``first_w_bit`` bits for weights
    and at least 8 for the image. (On digits, 1 bit there costs 2 points.) The last one stays float where it is linear:
    it has few weights, and its outputs are the decision.
    Raises UsageError where a layer to skip is not there, or nothing is left to convert.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTED)]
    if not layers:
        raise UsageError(f"{settings.model} has no convolution and no linear layer to convert; choose another.")
    first, (last, classifier) = layers[0][0], layers[-1]
    keep = [last] if len(layers) > 1 and isinstance(classifier, nn.Linear) else []
    careful = {"w_bit": settings.first_w_bit, "a_bit": settings.a_bit and max(settings.a_bit, FIRST_A_BIT)}
    try:
        report = quantize_(
            model,
            w_bit=settings.w_bit,
            a_bit=settings.a_bit,
            g_bit=settings.g_bit,
            skip=[*settings.skip, *keep],
            overrides={first: careful},
            learn_scale=settings.learn_scale,
        )
    except ValueError as error:
        raise UsageError(f"{settings.model} cannot be converted as asked: {error}") from None
    if not report.converted:
        raise UsageError(f"no layer of {settings.model} is left to convert; skip fewer layers.")


def store(path: Path, model: nn.Module, settings: Settings, data: ImageData) -> None:
    """Write the model as it is deployed, with its card; an earlier file is replaced in one step."""
    card = Card(settings.model, data.input_shape, data.classes, settings.data, settings.image_size)
    save(model, path, metadata=json.loads(json.dumps(asdict(card))))  # tuples become lists, as the file has them


def restore(source: Path, model_name: str | None) -> tuple[nn.Module, Card, Path]:
    """The model of a file, or of a run's folder, in evaluation mode; its card; and the file.

    model_name: what to rebuild the network from; needed where the card names a callable, because importing that runs
    code, and which code must be the user's choice and not the file's.
    Raises UsageError where it is needed and missing, RunError where the file cannot be read.
    """
    path = RunFolder(source).model if source.is_dir() else source
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a run's folder or a model's file.")
    card = read_card(path)
    if model_name is None and card.model not in BUILTIN:
        raise UsageError(
            f"{path} names the model {card.model}, whose import runs code; pass --model {card.model} if you trust it."
        )
    model = build_model(model_name or card.model, card.input_shape, len(card.classes))
    load(model, path)
    return model.eval(), card, path


def read_card(path: Path) -> Card:
    """The card in a model's file. Raises RunError where there is none: the network alone, of which ``--model`` is the
    name, does not tell what images and how many classes it is for."""
    stored = read_metadata(path)["metadata"]
    try:
        shape, classes = tuple(stored["input_shape"]), tuple(stored["classes"])
        return Card(**stored | {"input_shape": shape, "classes": classes})
    except (TypeError, KeyError):
        raise RunError(
            f"{path} does not say what it is a model of: bitorch-engine train did not write it, and --model says "
            "nothing of images and classes. Save it with metadata that has "
            f"{', '.join(field.name for field in fields(Card))}; or look at it in Python: "
            "bitorch_engine.checkpoint.read_metadata gives shapes and bits of its weights."
        ) from None
