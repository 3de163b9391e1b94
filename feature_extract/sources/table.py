"""A table with columns for pictures, captions and recordings: CSV, TSV or Parquet.

    image,caption,audio
    images/a.jpg,"A dog, running.",audio/a.wav

Paths are seen from the folder of the table, or from --folder. Rows of one picture are narrations of one record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import MALFORMED, bad_row, key_of, required, stem_of, table_rows, well_formed
from opt.config import UserError, extra

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
BATCH_ROWS = 4096


@dataclass(frozen=True)
class Source:
    """A .csv, .tsv or .parquet file; the corpus is that file. Every row has a picture, a caption, a recording, or some.

    CSV cells may be quoted, TSV cells are taken as they are. Parquet columns hold paths or URLs, not the pictures.
    """

    corpus: Positional[Path]
    """The file."""
    split: str = "train"
    """Only a name, unless --split-column is given."""
    image_column: str = ""
    """Column of pictures' paths or URLs; by default `image` where there is one."""
    caption_column: str = ""
    """Column of captions; by default `caption` where there is one."""
    audio_column: str = ""
    """Column of recordings' paths or URLs; by default `audio` where there is one."""
    key_column: str = ""
    """Column of records' names; by default a record is called after its picture, else its recording, else its row."""
    split_column: str = ""
    """Column that says which split a row is in; by default all rows are."""
    folder: Path | None = None
    """What the paths are seen from; by default the folder that the table lies in."""

    @property
    def root(self) -> Path:
        return self.folder or self.corpus.parent

    def files(self) -> list[Path]:
        if self.corpus.suffix.lower() not in (*DELIMITERS, PARQUET):
            raise UserError(f"{self.corpus}: the name must end in {', '.join(DELIMITERS)} or {PARQUET}")
        return [required(self.corpus)]

    def rows(self) -> Iterator[Item | BadRow]:
        [path] = self.files()
        rows = _parquet_rows(path) if path.suffix.lower() == PARQUET else _text_rows(path)
        columns = self._columns(next(rows)[1])
        for count, (number, cells) in enumerate(rows):
            try:
                if isinstance(cells, Exception):
                    raise cells
                values = {role: _text(cells[place]) for role, place in columns.items()}
                if "split" in columns and values["split"] != self.split:
                    continue
                row: Item | BadRow = _item(values, count, path.stem)
            except MALFORMED as error:
                row = bad_row(f"{path.name}:{number}", error)
            yield row

    def _columns(self, header: Any) -> dict[str, int]:
        """The place of each role's column. Raises UserError when one is missing, or all are."""
        asked = {"image": self.image_column, "caption": self.caption_column, "audio": self.audio_column,
                 "key": self.key_column, "split": self.split_column}
        names = [] if isinstance(header, Exception) else [str(name).strip() for name in header]
        columns = {}
        for role, name in asked.items():
            if name and name not in names:
                raise UserError(f"--{role}-column {name}: {self.corpus} has the columns {', '.join(names)}")
            standard = role if role in ("image", "caption", "audio") else ""
            if (name or standard) in names:
                columns[role] = names.index(name or standard)
        if not {"image", "caption", "audio"} & set(columns):
            raise UserError(f"{self.corpus} has the columns {', '.join(names)}; say which holds what: --image-column, "
                            "--caption-column, --audio-column")
        return columns


def _item(values: dict[str, str | None], count: int, stem: str) -> Item:
    """Row number `count` as an item. Raises ValueError when it is empty, or its key is."""
    image, caption, audio = (values.get(role) for role in ("image", "caption", "audio"))
    if image is None and caption is None and audio is None:
        raise ValueError("neither picture nor caption nor recording")
    key = values.get("key") or "" if "key" in values else _name(image or audio, f"{stem}-{count:08d}")
    narrations = () if caption is None and audio is None else (NarrationItem(str(count), caption, audio),)
    return Item(key_of(key), (image,) if image else (), narrations)


def _name(path: str | None, row: str) -> str:
    """A record's name: its file's path without ending, a URL's hash, or its row."""
    if path is None:
        return row
    if path.startswith(("http://", "https://")):
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    return stem_of(path)


def _text(cell: Any) -> str | None:
    """The cell as text, None for an empty one. Raises ValueError for what is neither text nor a number."""
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str | int):
        raise ValueError(f"a {type(cell).__name__} where a text was expected")
    return well_formed(str(cell))


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and cells, the header first. Raises UserError for an empty file."""
    rows = table_rows(path, DELIMITERS[path.suffix.lower()])
    if (header := next(rows, None)) is None:
        raise UserError(f"{path} is empty; expected a header of column names")
    yield header
    yield from rows


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers from 1 and cells, the columns' names as row 0. Raises UserError for what is no Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: {extra('parquet')}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield 0, file.schema_arrow.names
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, cells
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error})") from error
