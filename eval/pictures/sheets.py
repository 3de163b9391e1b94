"""Sheets of samples: a caption a row, its generated pictures, the true picture from its codes and as stored.

They are for looking: text_to_image/sheet-001.png, sheet-002.png, ... in the results' folder, 16 captions each.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from opt.files import write_atomic

ROWS, CELL, GAP, MARGIN = 16, 128, 8, 16
WORDS, LINE, LINES = 420, 22, 4
"""Pixels of the column of words and of a line, and the most lines of a caption; a note has two, of SMALL pixels."""
SMALL = 17
HEAD = 40
INK, GREY = "#1a1a1a", "#6b6b6b"

Row = tuple[str, str, Sequence[Image.Image | None]]
"""Caption, what is noted beneath it, and a picture a column; None leaves its place empty."""


def write_sheets(folder: Path, titles: Sequence[str], rows: Sequence[Row]) -> list[Path]:
    """Write as many sheets as the rows need; those of an earlier evaluation go. `titles`: one a column."""
    paths = [folder / f"sheet-{first // ROWS + 1:03}.png" for first in range(0, len(rows), ROWS)]
    for place, path in enumerate(paths):
        save_picture(path, sheet(titles, rows[place * ROWS : (place + 1) * ROWS]))
    for path in set(folder.glob("sheet*.png")) - set(paths):
        path.unlink()
    return paths


def sheet(titles: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """One sheet."""
    size = (2 * MARGIN + WORDS + len(titles) * (CELL + GAP), 2 * MARGIN + HEAD + len(rows) * (CELL + GAP))
    page = Image.new("RGB", size, "white")
    canvas, font, small = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        canvas.text((_left(column), MARGIN), title, fill=GREY, font=small)
    for place, (caption, note, pictures) in enumerate(rows):
        top = MARGIN + HEAD + place * (CELL + GAP)
        words = wrapped(caption, font, WORDS - MARGIN, LINES)
        canvas.multiline_text((MARGIN, top), "\n".join(words), fill=INK, font=font, spacing=LINE - 16)
        beneath = "\n".join(wrapped(note, small, WORDS - MARGIN, 2))
        canvas.multiline_text((MARGIN, top + LINE * len(words) + 2), beneath, fill=GREY, font=small, spacing=SMALL - 13)
        for column, picture in enumerate(pictures):
            if picture is not None:
                page.paste(_fitted(picture), (_left(column), top))
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """`text` in at most `most` lines of `width` pixels; an ellipsis ends what is cut, words too long are broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while word:
            joined = f"{line} {word}".strip()
            if font.getlength(joined) <= width:
                line, word = joined, ""
            elif line:
                lines, line = [*lines, line], ""
            else:
                fits = max(1, max(n for n in range(len(word) + 1) if font.getlength(word[:n]) <= width))
                lines, word = [*lines, word[:fits]], word[fits:]
    lines = [*lines, line] if line else lines
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last} …") > width:
        last = last[:-1].rstrip()
    return [*lines[: most - 1], f"{last} …"]


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _left(column: int) -> int:
    return MARGIN + WORDS + column * (CELL + GAP)


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture in a cell, its proportions kept."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)
