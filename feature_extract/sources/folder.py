"""A plain folder: pictures, captions and recordings that share a name.

    holiday/beach.jpg      a picture
    holiday/beach.txt      its captions, one a line
    holiday/beach.wav      the first caption, spoken

Files of one folder and one name, whatever their ending, are one record; any of the three may be missing everywhere.
Pictures alone make an image-only corpus, recordings alone a speech-only one, with texts beside them a transcribed one.
"""

from __future__ import annotations

import itertools
import os
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
    stem_of,
    walk,
    well_formed,
)
from opt.config import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
RECORDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
CAPTIONS = (".txt",)


@dataclass(frozen=True)
class Source:
    """A folder, read with all below it: pictures, .txt captions and recordings of one name are a record."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Subfolder to read; train is the whole corpus where it has no such subfolder."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        files: list[Path] = []
        for folder, names in walk(split_folder(self.corpus, self.split)):
            files.append(folder)
            files += [folder / name for name in names if _ending(name) in CAPTIONS]
        return files

    def rows(self) -> Iterator[Item | BadRow]:
        found = False
        for folder, names in walk(split_folder(self.corpus, self.split)):
            place = prefix(folder, self.corpus)
            known = [name for name in names if _ending(name) in PICTURES + RECORDINGS + CAPTIONS]
            for stem, group in itertools.groupby(known, key=stem_of):
                found = True
                yield item_or_bad_row(place + stem, self._item, list(group), place, stem)
        if not found:
            raise UserError(f"{self.corpus}: no pictures, captions or recordings; known endings are "
                            f"{', '.join(PICTURES + CAPTIONS + RECORDINGS)}")

    def _item(self, names: list[str], place: str, stem: str) -> Item:
        """The record of one name. The first recording goes with the first caption, and so on. Raises ValueError."""
        paths = [well_formed(place + name) for name in names]
        pictures = tuple(path for path in paths if _ending(path) in PICTURES)
        recordings = [path for path in paths if _ending(path) in RECORDINGS]
        captions = [caption for path in paths if _ending(path) in CAPTIONS for caption in self._captions(path)]
        pairs = enumerate(itertools.zip_longest(captions, recordings))
        return Item(key_of(place + stem), pictures, tuple(NarrationItem(str(number), *pair) for number, pair in pairs))

    def _captions(self, path: str) -> list[str]:
        """The lines of a text. Raises ValueError or OSError when it is none."""
        if not (self.corpus / path).is_file():  # a pipe may never end
            raise ValueError(f"{path} is no ordinary file")
        return [well_formed(decode(line).strip()) for _, line in numbered_lines(self.corpus / path)]



def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
