"""Karpathy's splits of COCO, Flickr30k and Flickr8k, with the captions that they carry.

    dataset_coco.json | dataset_flickr30k.json | dataset_flickr8k.json
        {"images": [{"split", "filename", "sentences": [{"raw", "sentid"}]; COCO also "filepath", "cocoid"}]}
    COCO: train2014/ and val2014/, as "filepath" says; flickr30k-images/; Flicker8k_Dataset/

Karpathy and Fei-Fei, arXiv 1412.2306. COCO's usual training split is train+restval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    field,
    identifier,
    item_or_bad_row,
    join,
    key_of,
    key_of_path,
    load_json,
    required,
)
from opt.config import UserError

FOLDERS = {"coco": "", "flickr30k": "flickr30k-images", "flickr8k": "Flicker8k_Dataset"}
SPLITS = ("train", "restval", "val", "test")


@dataclass(frozen=True)
class Source:
    """Karpathy's splits: dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json, beside the pictures."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """train, val or test; COCO also has restval, and train+restval is its usual training split."""
    dataset: Literal["coco", "flickr30k", "flickr8k"] = "coco"
    """Which of the three files."""
    pictures: str = ""
    """Folder of the pictures, or a URL; by default where they are published: COCO's train2014 and val2014 in the
    corpus, flickr30k-images, Flicker8k_Dataset."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        if unknown := [part for part in self.split.split("+") if part not in SPLITS]:
            raise UserError(f"--split {self.split}: {unknown[0]!r} is none of {', '.join(SPLITS)}, joined by +")
        return [required(self.corpus / f"dataset_{self.dataset}.json")]

    def rows(self) -> Iterator[Item | BadRow]:
        [path] = self.files()
        wanted = self.split.split("+")
        folder = self.pictures or FOLDERS[self.dataset]
        for number, entry in enumerate(load_json(path, "images")["images"]):
            if not isinstance(entry, dict) or entry.get("split", "train") in wanted:
                yield item_or_bad_row(f"{path.name}:images[{number}]", _item, entry, folder)


def _item(entry: Any, folder: str) -> Item:
    """A picture with its sentences. COCO's has its number as the key, Flickr's its file's name."""
    field(entry, "split", str)
    name = field(entry, "filename", str)
    key = key_of(identifier(entry, "cocoid")) if "cocoid" in entry else key_of_path(name)
    path = join(field(entry, "filepath", str), name) if "filepath" in entry else name
    sentences = field(entry, "sentences", list)
    narrations = (NarrationItem(identifier(one, "sentid"), field(one, "raw", str)) for one in sentences)
    return Item(key, (join(folder, path),), tuple(narrations))
