"""A text file with one caption a line: text alone, without pictures or speech."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import decode, item_or_bad_row, key_of, numbered_lines, required, well_formed


@dataclass(frozen=True)
class Source:
    """A text file, one caption a line; blank lines are left out. The corpus is the file."""

    corpus: Positional[Path]
    """The text file."""
    split: str = "train"
    """Only a name: the file is the split."""

    @property
    def root(self) -> Path:
        return self.corpus.parent

    def files(self) -> list[Path]:
        return [required(self.corpus)]

    def rows(self) -> Iterator[Item | BadRow]:
        [path] = self.files()
        for number, line in numbered_lines(path):
            yield item_or_bad_row(f"{path.name}:{number}", _item, line, f"{path.stem}-{number:08d}")


def _item(line: bytes, name: str) -> Item:
    return Item(key_of(name), (), (NarrationItem("0", well_formed(decode(line).strip())),))
