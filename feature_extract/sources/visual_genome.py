"""Visual Genome: the phrases that describe regions of a picture, as that picture's narrations.

    region_descriptions.json    [{"id", "regions": [{"region_id", "image_id", "phrase", "x", "y", "width", "height"}]}]
    image_data.json             [{"image_id", "url": ".../VG_100K_2/1.jpg", "coco_id", "flickr_id", ...}]
    VG_100K/<image_id>.jpg, VG_100K_2/<image_id>.jpg

Krishna et al., arXiv 1602.07332. A picture has about fifty phrases, many alike: some are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    MALFORMED,
    field,
    identifier,
    item_or_bad_row,
    join,
    key_of,
    required,
    stream_json,
)
from opt.config import UserError


@dataclass(frozen=True)
class Source:
    """Visual Genome's region descriptions: region_descriptions.json, image_data.json, VG_100K and VG_100K_2."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Visual Genome has no splits; all of it is train."""
    phrases: int = 10
    """At most so many phrases a picture; 0 takes all."""
    order: Literal["longest", "first"] = "longest"
    """Which phrases: those of most words, or those listed first."""
    pictures: str = ""
    """Folder that VG_100K and VG_100K_2 lie in, or a URL; by default the corpus itself."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        if self.split != "train":
            raise UserError(f"--split {self.split}: Visual Genome has no splits; leave the option out")
        if self.phrases < 0:
            raise UserError(f"--phrases {self.phrases}: must be 0 (all) or more")
        return [required(self.corpus / name) for name in ("region_descriptions.json", "image_data.json")]

    def rows(self) -> Iterator[Item | BadRow]:
        descriptions, images = self.files()
        folders = _folders(images)
        for number, entry in enumerate(stream_json(descriptions)):
            yield item_or_bad_row(f"{descriptions.name}[{number}]", self._item, entry, folders)

    def _item(self, entry: Any, folders: dict[str, str]) -> Item:
        """A picture with its phrases. Raises one of MALFORMED, also when image_data.json does not know the picture."""
        image_id = identifier(entry, "id")
        if image_id not in folders:
            raise ValueError(f"picture {image_id} is not in image_data.json")
        narrations = [NarrationItem(identifier(region, "region_id"), field(region, "phrase", str).strip())
                      for region in field(entry, "regions", list)]
        if self.order == "longest":
            narrations.sort(key=lambda narration: -len((narration.caption or "").split()))
        chosen = narrations[: self.phrases or None]
        return Item(key_of(image_id), (join(self.pictures, f"{folders[image_id]}/{image_id}.jpg"),), tuple(chosen))


def _folders(path: Path) -> dict[str, str]:
    """VG_100K or VG_100K_2 for every picture, as its URL says. An entry that does not say it is left out."""
    folders = {}
    for entry in stream_json(path):
        try:
            folders[identifier(entry, "image_id")] = field(entry, "url", str).split("/")[-2]
        except MALFORMED:
            continue  # the picture's regions become a BadRow
    return folders
