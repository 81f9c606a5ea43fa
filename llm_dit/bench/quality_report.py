"""The results of `bench quality` to look at: a contact sheet, and one HTML file that holds all it shows."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw

from ..names import format_bytes
from ..writing import write_text
from .results import Row

COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "caption_score": ("captions right", ".1%"),
    "caption_parts": ("parts right", ".1%"),
    "psnr": ("PSNR dB", ".1f"),
    "ssim": ("SSIM", ".4f"),
    "flip": ("FLIP", ".4f"),
    "lpips": ("LPIPS", ".4f"),
}
"""By the key of a row, its title and format."""
_SHOWN: Final = 8
"""Pictures of a row of the sheet."""
_LABEL: Final = 200
"""Width of the labels in pixels."""
_HEADER: Final = 64
"""Height of the prompts in pixels."""
_LABEL_HEIGHT: Final = 128
"""Their height, and so the least of a row."""
_LETTER: Final = 6
"""Width of a letter of Pillow's font in pixels."""
_WIDTHS: Final = (128, 256)
"""Of a picture on the sheet, at least and at most: text has one size, and the pictures themselves lie in the folder."""


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows."""
    titles, *values = _grid(rows)
    return "\n".join([_line(titles), "|" + "---|" * len(titles), *map(_line, values)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _grid(rows: Sequence[Row]) -> list[list[str]]:
    """The titles of the columns that any row has a value for, and the cells of every row."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    titles = ["method", "transformer", *(COLUMNS[key][0] for key in keys), "latent error, last step"]
    return [titles, *(_cells(row, keys) for row in rows)]


def _cells(row: Row, keys: Sequence[str]) -> list[str]:
    values = [format(row[key], COLUMNS[key][1]) if key in row else "" for key in keys]
    return [row["method"], format_bytes(row["bytes"]), *values, f"{row['latent_error'][-1]:.4f}" if "latent_error" in row else ""]


def check_sheet(path: Path | None) -> None:
    """Raises ValueError for a sheet whose name tells no format of pictures."""
    if path is not None and path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path.name!r} tells no format of pictures: give a sheet a name that ends with .png")


def contact_sheet(rows: Sequence[Row], folder: Path, prompts: Sequence[str]) -> Image.Image:
    """A row of pictures per method, with what was measured beside it, under their prompts."""
    shown = range(min(_SHOWN, len(prompts)))
    found = {row["method"]: [_first_picture(folder / row["method"], seed) for seed in shown] for row in rows}
    first = next(iter(found.values()))[0]
    width = min(max(first.width, _WIDTHS[0]), _WIDTHS[1])
    height = max(round(width * first.height / first.width), _LABEL_HEIGHT)
    sheet = Image.new("RGB", (_LABEL + width * len(shown), _HEADER + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column in shown:
        lines = textwrap.wrap(prompts[column], width // _LETTER, max_lines=4, placeholder=" ...")
        pen.multiline_text((_LABEL + column * width + 4, 4), "\n".join(lines), fill="black")
    for place, row in enumerate(rows):
        top = _HEADER + place * height
        pen.multiline_text((8, top + 8), "\n".join(_told(row)), fill="black", spacing=3)
        for column, picture in enumerate(found[row["method"]]):
            tile = picture.resize((width, round(width * picture.height / picture.width)))
            sheet.paste(tile, (_LABEL + column * width, top))
    return sheet


def _first_picture(folder: Path, seed: int) -> Image.Image:
    return Image.open(folder / f"{seed:04}-0.png").convert("RGB")


def _told(row: Row) -> list[str]:
    values = [f"{title} {format(row[key], form)}" for key, (title, form) in COLUMNS.items() if key in row]
    return [row["method"], format_bytes(row["bytes"]), *values]


def write_report(path: Path, rows: Sequence[Row], folder: Path, prompts: Sequence[str]) -> None:
    """One HTML file: the table, the sheet, the prompts, and the layers whose outputs are noisiest."""
    buffer = io.BytesIO()
    contact_sheet(rows, folder, prompts).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    titles, *values = _grid(rows)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in values)
    layers = "".join(
        f"<li>{html.escape(row['method'])}: "
        + ", ".join(f"{html.escape(layer['name'])} ({layer['output_db']:.1f} dB)" for layer in row["worst_layers"])
        for row in rows
        if row.get("worst_layers")
    )
    listed = "".join(f"<li>{html.escape(prompt)}" for prompt in prompts[:_SHOWN])
    write_text(
        path,
        f"""<!doctype html><meta charset="utf-8"><title>{html.escape(str(rows[0]["source"]))}</title>
<style>body{{font:14px sans-serif;margin:2em}}td,th{{padding:.3em .8em;text-align:left}}img{{max-width:100%}}</style>
<h1>{html.escape(str(rows[0]["source"]))}</h1>
<table><tr>{"".join(f"<th>{html.escape(title)}</th>" for title in titles)}</tr>{body}</table>
<p>Medians over {rows[0]["prompts"]} prompts, against bf16 ("none"); "float32" or "compile" is bf16's own distance.</p>
<img alt="contact sheet" src="data:image/png;base64,{encoded}"><ol>{listed}</ol>
<h2>Noisiest layers</h2><p>Signal to noise ratio of their outputs on the first picture.</p><ul>{layers}</ul>
""",
    )
