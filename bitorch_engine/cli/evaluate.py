"""``bitorch-engine eval``: the accuracy of a trained model."""

import json
from pathlib import Path

import click

from bitorch_engine.cli.data import load_data
from bitorch_engine.cli.errors import UsageError
from bitorch_engine.cli.replica import chosen_device
from bitorch_engine.cli.stored_model import restore
from bitorch_engine.cli.training import accuracy


@click.command("eval", context_settings={"show_default": True})
@click.argument("source", metavar="RUN_OR_FILE", type=click.Path(path_type=Path))
@click.option("--data", help="Data to test on.  [default: what the model was trained on]")
@click.option("--model", help="The network, package.module:callable; needed where it is not a built-in one.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(source: Path, data: str | None, model: str | None, device: str, as_json: bool) -> None:
    """Measure the accuracy of a trained model on the test part of its data, or of other data."""
    network, card, path = restore(source, model)
    source_of_data = data or card.data
    tested = load_data(source_of_data, card.image_size if Path(source_of_data).is_dir() else None)
    if (tested.input_shape, tested.classes) != (card.input_shape, card.classes):
        raise UsageError(
            f"{path} is for images of shape {card.input_shape} and the classes {', '.join(card.classes)}; "
            f"{tested.name} has {tested.input_shape} and {', '.join(tested.classes)}."
        )
    share = accuracy(network.to(chosen_device(device)), tested.test_images, tested.test_labels)
    count = len(tested.test_labels)
    if as_json:
        click.echo(json.dumps({"file": str(path), "data": tested.name, "images": count, "accuracy": share}))
    else:
        click.echo(f"{path}: accuracy {share:.2%} on {count} test images of {tested.name}")
