"""Speech with what is said in it: recordings and transcripts, without pictures.

    transcripts.tsv             id<tab>words; the recording is flac/<id>.flac, or where --recordings says
    or, as LibriSpeech has it,
    <split>/103/1240/103-1240.trans.txt       "103-1240-0000 CHAPTER ONE MISSUS RACHEL LYNDE IS SURPRISED" a line
    <split>/103/1240/103-1240-0000.flac

Panayotov et al. 2015. The words become the caption of the recording, as written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    decode,
    item_or_bad_row,
    key_of,
    numbered_lines,
    prefix,
    split_folder,
    walk,
    well_formed,
)
from opt.config import UserError

TABLE = "transcripts.tsv"


@dataclass(frozen=True)
class Source:
    """Recordings with transcripts: transcripts.tsv and flac/, or LibriSpeech's folders of *.trans.txt and FLAC."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Subfolder to read, such as train-clean-100; train is the whole corpus where it has no such subfolder."""
    recordings: str = "flac/{id}.flac"
    """Where a line of transcripts.tsv has its recording, as seen from that file's folder, or a URL."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        folder = split_folder(self.corpus, self.split)
        if "{id}" not in self.recordings:
            raise UserError(f"--recordings {self.recordings}: must hold {{id}}, e.g. flac/{{id}}.flac")
        if (folder / TABLE).is_file():
            return [folder / TABLE]
        files = [place / name for place, names in walk(folder) for name in names if name.endswith(".trans.txt")]
        if not files:
            raise UserError(f"{folder}: neither {TABLE} nor any *.trans.txt below it")
        return sorted(files)

    def rows(self) -> Iterator[Item | BadRow]:
        for path in self.files():
            separator, pattern = ("\t", self.recordings) if path.name == TABLE else (" ", "{id}.flac")
            if not pattern.startswith(("http://", "https://")):
                pattern = prefix(path.parent, self.corpus) + pattern
            for number, line in numbered_lines(path):
                yield item_or_bad_row(f"{path.name}:{number}", _item, line, separator, pattern)


def _item(line: bytes, separator: str, pattern: str) -> Item:
    """One recording. Raises ValueError when the line has no separator."""
    name, found, words = well_formed(decode(line).strip("\r\n")).partition(separator)
    if not found:
        raise ValueError("expected an id and words")
    return Item(key_of(name), (), (NarrationItem("0", words.strip(), pattern.replace("{id}", name.strip())),))
