"""One self-contained HTML page about a run: result, pictures, layers and settings."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bitorch_engine.cli.layers import LayerRow
from bitorch_engine.cli.result import Result

STYLE = """
body { margin: 0; background: #f8fafc; color: #1e293b; font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 17px; margin: 36px 0 10px }
.subtitle { color: #64748b; margin: 2px 0 24px }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px }
.figures div, table, img { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px }
.figures div { padding: 14px 18px; color: #64748b; font-size: 13px }
.figures b { display: block; color: #0f172a; font-size: 26px; line-height: 1.3 }
img { width: 100%; box-sizing: border-box; padding: 10px }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums }
th, td { padding: 6px 14px; text-align: left } td { border-top: 1px solid #f1f5f9 }
th { font-weight: 600; font-size: 13px; color: #475569; background: #f1f5f9 }
.number { text-align: right } code { font: 13px ui-monospace, Menlo, Consolas, monospace }
"""


def write_report(
    path: Path,
    title: str,
    result: Result,
    rows: Sequence[LayerRow],
    settings: Iterable[tuple[str, str]],
    pictures: Iterable[tuple[str, str, Path]],
) -> None:
    """Write the page.  settings: names and values as text.  pictures: headings, explanations, and PNG files, which
    are embedded."""
    images = "".join(
        f'<h2>{escape(heading)}</h2><p>{escape(text)}</p><img alt="{escape(heading)}" src="data:image/png;base64,'
        f'{b64encode(picture.read_bytes()).decode()}">'
        for heading, text, picture in pictures
    )
    figures = "".join(
        f"<div><b>{value}</b>{escape(label)}</div>"
        for value, label in (
            (f"{result.accuracy:.1%}", "accuracy on test images, not warped"),
            (f"{result.file_bytes / result.float_file_bytes:.2f}×", "size of the float32 file"),
            (f"{result.state_bytes:.2f} B", "training state per packed weight, AdamW: 12 B"),
            (f"{result.seconds:.0f} s", f"training time, {result.epochs} epochs"),
        )
    )
    layers = [
        (
            row.name,
            row.kind,
            "×".join(map(str, row.shape)),
            str(row.bits),
            f"{row.stored_bytes:,}",
            f"{row.macs:,}" if row.macs else "",
        )
        for row in rows
    ]
    total_bytes, total_macs = sum(row.stored_bytes for row in rows), sum(row.macs for row in rows)
    layers.append(("total", "", "", "", f"{total_bytes:,}", f"{total_macs:,}"))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><main>
<h1>{escape(title)}</h1><p class="subtitle">trained with bitorch_engine</p>
<div class="figures">{figures}</div>
<h2>Result</h2>{_table(("", "this run", "float32 with AdamW"), result.rows())}
{images}
<h2>Layers</h2>{_table(("layer", "kind", "shape", "bits", "bytes", "MACs"), layers, first_number=3)}
<h2>Settings</h2>{_table(("option", "value"), settings)}
</main></body></html>
"""
    path.write_text(page, encoding="utf-8")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], first_number: int | None = None) -> str:
    """An HTML table; columns from ``first_number`` on are numbers, set to the right."""

    def line(tag: str, cells: Sequence[object]) -> str:
        numbers = range(len(cells) if first_number is None else first_number, len(cells))
        return "".join(
            f"<{tag}{' class=number' if index in numbers else ''}>{escape(str(cell))}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><tr>{line('th', head)}</tr>{body}</table>"
