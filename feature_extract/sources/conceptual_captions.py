"""Conceptual Captions 3M and 12M: a TSV file of captions and addresses of pictures on the web.

    Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv    caption<tab>URL
    cc12m.tsv                                                      URL<tab>caption

Which column is the address is seen row by row, and a header (caption, url) is skipped. Pictures are fetched from their
addresses, some of which are gone, or read from where they were downloaded to. Sharma et al. 2018; arXiv 2102.08981.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import item_or_bad_row, key_of, required, table_rows, well_formed
from opt.config import UserError

PER_SHARD = 10_000


@dataclass(frozen=True)
class Source:
    """Conceptual Captions: the corpus is one TSV file; pictures come from the web or lie beside it."""

    corpus: Positional[Path]
    """The TSV file."""
    split: str = "train"
    """Only a name: the file is the split."""
    pictures: str = "{url}"
    """Address or file of a picture as seen from the file's folder, of {url}, {row} counted from 0, and, as
    img2dataset counts, {shard} (row // 10000) and {index} (row in its shard), e.g.
    images/{shard:05}/{shard:05}{index:04}.jpg"""

    @property
    def root(self) -> Path:
        return self.corpus.parent

    def files(self) -> list[Path]:
        try:
            same = self._picture("http://a", 0) == self._picture("http://b", PER_SHARD + 1)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"--pictures {self.pictures}: made of {{url}}, {{row}}, {{shard}}, {{index}}") from error
        if same:
            raise UserError(f"--pictures {self.pictures}: one picture for all rows; say {{row}} or {{url}}")
        return [required(self.corpus)]

    def rows(self) -> Iterator[Item | BadRow]:
        [path] = self.files()
        count = 0
        for number, cells in table_rows(path, "\t"):
            if number == 1 and isinstance(cells, list) and {"caption", "url"} <= set(cells):
                continue
            yield item_or_bad_row(f"{path.name}:{number}", self._item, cells, count)
            count += 1

    def _item(self, cells: list[str], row: int) -> Item:
        caption, url = _caption_and_url(cells)
        key = key_of(f"{self.corpus.stem}-{row:08d}")
        return Item(key, (self._picture(url, row),), (NarrationItem("0", caption),))

    def _picture(self, url: str, row: int) -> str:
        return self.pictures.format(url=url, row=row, shard=row // PER_SHARD, index=row % PER_SHARD)


def _caption_and_url(cells: list[str]) -> tuple[str, str]:
    """A row's two cells, whichever stands first. Raises ValueError when not exactly one of them is an address."""
    first, second = (well_formed(cell) for cell in cells)
    addresses = [cell.startswith(("http://", "https://")) for cell in (first, second)]
    if sum(addresses) != 1:
        raise ValueError("expected a caption and an address that begins with http")
    return (second, first) if addresses[0] else (first, second)
