"""Progress is a live bar on a terminal, plain lines elsewhere, and nothing where it is not wanted."""

import io

from rich.console import Console

from bitorch_engine.cli.display import Display
from bitorch_engine.cli.training import Epoch, Progress

EPOCH = Epoch(1, 0.5, 0.9, 0.987, 0.123, 0.01, 2.0)


def shown(**console: bool) -> str:
    text = io.StringIO()
    with Display(Console(file=text, width=100, **console), 3, 4, Progress()) as display:
        display.step(Progress(epoch=0, step=2, loss=3.0))
        display.epoch(EPOCH)
        display.step(Progress(epoch=1, step=1, loss=0.25))
    return text.getvalue()


def test_elsewhere_than_on_a_terminal_each_epoch_is_a_line() -> None:
    assert shown() == "epoch 1/3  loss 0.5000  accuracy 98.7%  codes changed 12.3%  2.0 s\n"


def test_a_terminal_shows_the_epoch_under_way_and_the_last_result() -> None:
    text = shown(force_terminal=True)
    for part in ("2/3", "loss 0.250", "accuracy 98.7%", "codes changed 12.3%"):
        assert part in text


def test_a_quiet_console_stays_empty() -> None:
    assert shown(quiet=True) == ""
    assert shown(quiet=True, force_terminal=True) == ""
