"""COCO captions: one JSON file of pictures and their captions, beside a folder of pictures for each split.

    annotations/captions_train2017.json
        {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
    train2017/000000000009.jpg, or in 2014 train2014/COCO_train2014_000000000009.jpg

Lin et al., arXiv 1405.0312; Chen et al., arXiv 1504.00325. A corpus with one `captions.json` and `images/` is read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    MALFORMED,
    bad_row,
    field,
    identifier,
    item_or_bad_row,
    join,
    key_of,
    load_json,
    split_file,
)
from opt.config import UserError


@dataclass(frozen=True)
class Source:
    """COCO captions: annotations/captions_SPLIT.json and the folder SPLIT of pictures, e.g. train2017.

    Or the file captions.json and the folder images.
    """

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Such as train2017; train alone where the corpus has one year, or one captions.json."""
    pictures: str = ""
    """Folder of the split's pictures, or a URL; by default the one named like the split."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        return [self._file()[0]]

    def rows(self) -> Iterator[Item | BadRow]:
        path, folder = self._file()
        content = load_json(path, "images", "annotations")
        captions: dict[str, list[NarrationItem]] = {}
        bad: list[BadRow] = []
        for number, entry in enumerate(content["annotations"]):
            try:
                narration = NarrationItem(identifier(entry, "id"), field(entry, "caption", str))
                captions.setdefault(identifier(entry, "image_id"), []).append(narration)
            except MALFORMED as error:
                bad.append(bad_row(f"{path.name}:annotations[{number}]", error))
        for number, entry in enumerate(content["images"]):
            yield item_or_bad_row(f"{path.name}:images[{number}]", _item, entry, self.pictures or folder, captions)
        yield from bad

    def _file(self) -> tuple[Path, str]:
        """The captions and the folder of their pictures. Raises UserError when there are none."""
        whole = self.corpus / "captions.json"
        if whole.is_file() and self.split == "train":
            return whole, "images"
        if whole.is_file() and not (self.corpus / "annotations").is_dir():
            raise UserError(f"{self.corpus}: --split {self.split}: captions.json is all there is; say --split train")
        return split_file(self.corpus, "annotations/captions_{}.json", self.split)


def _item(entry: Any, folder: str, captions: dict[str, list[NarrationItem]]) -> Item:
    """A picture with all its captions. Raises one of MALFORMED."""
    image_id = identifier(entry, "id")
    return Item(key_of(image_id), (join(folder, field(entry, "file_name", str)),), tuple(captions.get(image_id, ())))
