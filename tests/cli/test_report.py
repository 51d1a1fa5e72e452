"""Pictures are written, and the page stands alone: everything is in it, and nothing in it is taken for HTML."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from bitorch_engine.cli.layers import LayerRow
from bitorch_engine.cli.plots import draw_curves, draw_weights
from bitorch_engine.cli.report import write_report
from bitorch_engine.cli.result import Result
from bitorch_engine.cli.training import Epoch

ROWS = [
    LayerRow("<conv>", "nBitConv2d", (4, 1, 3, 3), 2, 36, 25, 1234, (9, 9, 9, 9)),
    LayerRow("sign", "nBitConv2d", (4, 1, 3, 3), 1, 36, 21, 1234, (20, 16)),
    LayerRow("norm", "BatchNorm2d", (4,), 32, 17, 72, 0, None),
]
RESULT = Result(0.9876, 3, 12.3, 72, 40_000, 160_000, 3.08)


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_are_drawn_for_any_number_of_epochs_and_layers(tmp_path: Path, count: int) -> None:
    draw_curves([Epoch(n, 1 / n, 0.5, 0.25, 0.1, 0.01, 2.0) for n in range(1, count + 1)], tmp_path / "curves.png")
    draw_weights(ROWS * count, tmp_path / "weights.png")
    assert size(tmp_path / "curves.png") == (1300, 364)
    assert size(tmp_path / "weights.png") == (1300, 299 * (1 if count == 1 else 2))


def test_a_model_without_packed_layers_gives_an_empty_picture(tmp_path: Path) -> None:
    draw_weights(ROWS[2:], tmp_path / "weights.png")
    assert size(tmp_path / "weights.png") == (1300, 299)


def size(picture: Path | io.BytesIO) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


class Page(HTMLParser):
    """Cells, addresses and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_the_page_is_whole_and_holds_all_of_it(tmp_path: Path) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "picture.png")
    pictures = [("Curves & more", "less < more", tmp_path / "picture.png")]
    write_report(tmp_path / "report.html", "a<b>", RESULT, ROWS, [("--lr", "0.1")], pictures)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for wanted in ("98.76%", "40.0 KB (0.25x)", "160.0 KB", "3.08 bytes", "<conv>", "4×1×3×3", "1,234", "--lr", "0.1"):
        assert wanted in page.cells
    assert "<b>a" not in text
    assert "a&lt;b&gt;" in text
    assert "<p>less &lt; more</p>" in text
    (address,) = page.addresses
    assert size(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))) == (3, 2)
    assert not re.search(r"https?://|@import|url\(", text)
