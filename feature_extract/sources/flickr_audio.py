"""Flickr8k and Flickr30k captions, with the Flickr8k Audio Caption Corpus where it is there.

    captions, one of                Flickr8k.token.txt, results_20130124.token    IMAGE.jpg#0<tab>caption
                                    captions.txt, captions.csv                    image,caption below a header
                                    results.csv                                   image_name| comment_number| comment
    flickr_audio/wav2capt.txt       IMAGE_0.wav IMAGE.jpg #0
    flickr_audio/wavs/IMAGE_0.wav
    Flickr_8k.trainImages.txt, .devImages.txt, .testImages.txt    names of pictures; absent: all is train
    Flicker8k_Dataset/, flickr30k-images/, Images/, flickr30k_images/ or images/

Captions and lists may also lie in Flickr8k_text/. Hodosh et al. 2013; Young et al. 2014; Harwath and Glass 2015.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    decode,
    item_or_bad_row,
    join,
    key_of_path,
    numbered_lines,
    table_rows,
    text_lines,
    well_formed,
)
from opt.config import UserError

CAPTIONS = ("Flickr8k.token.txt", "results_20130124.token", "captions.txt", "captions.csv", "results.csv")
PICTURES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "Images", "flickr30k_images", "images")
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
RECORDINGS = "flickr_audio"
HEADERS = ("image", "image_name")


@dataclass(frozen=True)
class Source:
    """Flickr8k or Flickr30k: a file of captions, a folder of pictures, flickr_audio/ where there is speech."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """train, val or test, by Flickr8k's lists of pictures; without the lists, train is everything."""
    pictures: str = ""
    """Folder of the pictures, or a URL; by default the first that is there of the published ones."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        listed, spoken = self._list(), self.corpus / RECORDINGS / "wav2capt.txt"
        return [self._captions(), *([listed] if listed else []), *([spoken] if spoken.is_file() else [])]

    def rows(self) -> Iterator[Item | BadRow]:
        path, listed, folder, recordings = self._captions(), self._list(), self._pictures(), self._recordings()
        wanted = {join(folder, name) for name in text_lines(listed)} if listed else None
        delimiter, counts = _delimiter(path), Counter[str]()
        for number, cells in table_rows(path, delimiter):
            if number == 1 and isinstance(cells, list) and cells[0] in HEADERS:
                continue
            row = item_or_bad_row(f"{path.name}:{number}", _item, cells, delimiter, counts, folder, recordings)
            if isinstance(row, BadRow) or wanted is None or row.pictures[0] in wanted:
                yield row

    def _captions(self) -> Path:
        """Raises UserError when there is no file of captions."""
        path = self._find(*CAPTIONS)
        if path is None:
            raise UserError(f"{self.corpus}: none of {', '.join(CAPTIONS)}, nor in its Flickr8k_text")
        return path

    def _list(self) -> Path | None:
        """The names of the split's pictures. Raises UserError for a split that there is no list for."""
        if not self._find(*LISTS.values()) and self.split == "train":
            return None
        listed = self._find(LISTS[self.split]) if self.split in LISTS else None
        if listed is None:
            raise UserError(f"{self.corpus}: no split {self.split!r}; train, val and test are told by "
                            f"{', '.join(LISTS.values())}")
        return listed

    def _find(self, *names: str) -> Path | None:
        folders = (self.corpus, self.corpus / "Flickr8k_text")
        return next((path for name in names for folder in folders if (path := folder / name).is_file()), None)

    def _pictures(self) -> str:
        """Raises UserError when no folder of pictures has a published name."""
        there = [self.pictures] if self.pictures else [name for name in PICTURES if (self.corpus / name).is_dir()]
        if not there:
            raise UserError(f"{self.corpus}: no folder {', '.join(PICTURES)}; say where the pictures are: --pictures")
        return there[0]

    def _recordings(self) -> dict[tuple[str, str], str]:
        """The recording of every picture's caption of some number. A line of another form is left out."""
        path = self.corpus / RECORDINGS / "wav2capt.txt"
        recordings = {}
        for _, line in numbered_lines(path) if path.is_file() else ():
            try:
                wav, image, order = decode(line).split()
                recordings[image, order.removeprefix("#")] = f"{RECORDINGS}/wavs/{wav}"
            except ValueError:
                continue  # the caption stays, without speech
        return recordings


def _delimiter(path: Path) -> str:
    return "|" if path.name == "results.csv" else "\t" if ".token" in path.name else ","


def _item(cells: list[str], delimiter: str, counts: Counter[str], folder: str,
          recordings: dict[tuple[str, str], str]) -> Item:
    """A picture with one caption. Raises one of MALFORMED.

    counts: the captions so far of every picture, for the form that does not number them.
    """
    if delimiter == ",":
        image, caption = cells
        order = str(counts[image])
        counts[image] += 1
    elif delimiter == "|":
        image, order, first, *rest = cells
        order, caption = str(int(order)), "|".join([first, *rest]).strip()
    else:
        name, caption = cells
        image, _, order = name.rpartition("#")
        order = str(int(order))
    narration = NarrationItem(order, well_formed(caption), recordings.get((image, order)))
    return Item(key_of_path(image), (join(folder, image),), (narration,))
