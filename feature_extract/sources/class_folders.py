"""Pictures in a folder for each class, as ImageNet has them; a class's name becomes a caption by templates.

    train/n01440764/n01440764_10026.JPEG    <split>/<class>/<picture>
    LOC_synset_mapping.txt                  "n01440764 tench, Tinca tinca" a line, with --names
                                            "n01440764<tab>tench" and Open Images' "/m/011k07,Tortoise" are read too
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from feature_extract.sources.folder import PICTURES
from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    MALFORMED,
    item_or_bad_row,
    key_of_path,
    required,
    split_folder,
    text_lines,
    walk,
    well_formed,
)
from opt.config import UserError

TEMPLATES = (
    "a photo of a {}.",
    "this is a {}.",
    "a picture with a {} in it.",
    "there is a {} here.",
    "a close-up of a {}.",
    "one can see a {}.",
    "a {} in a photo.",
)


@dataclass(frozen=True)
class Source:
    """A folder for each class, with pictures. Their captions say the class by templates."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Subfolder that holds the classes; train is the corpus itself where it has no such subfolder."""
    names: Path | None = None
    """File of names: a class's folder, then a space, a tab or a comma, then its names, the first of which is taken.
    By default folders are called what is in the pictures."""
    templates: Path | None = None
    """File of templates, one a line, {} where the name goes; by default a few are built in."""
    captions: Literal["one", "all"] = "one"
    """A caption a picture, by a template drawn from its name; or all templates as narrations of each picture."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        given = [required(path) for path in (self.names, self.templates) if path is not None]
        return [*given, *(folder for folder, _ in walk(split_folder(self.corpus, self.split)))]

    def rows(self) -> Iterator[Item | BadRow]:
        names, templates = self._names(), self._templates()
        for path, folder in self._pictures():
            yield item_or_bad_row(path, self._item, path, folder, names, templates)

    def labels(self) -> Iterator[dict[str, Any]]:
        """The class of every picture, by its name. Pictures that are bad rows are left out: `rows` has named them."""
        names = self._names()
        for path, folder in self._pictures():
            try:
                yield {"image_id": key_of_path(path), "labels": [well_formed(_name(folder, names))]}
            except MALFORMED:
                continue

    def _pictures(self) -> Iterator[tuple[str, str]]:
        """Path and class folder of every picture, in order."""
        top = split_folder(self.corpus, self.split)
        for folder, files in walk(top):
            inside = folder.relative_to(top).parts
            for file in files if inside else ():
                path = (folder / file).relative_to(self.corpus).as_posix()
                if Path(file).suffix.lower() in PICTURES:
                    yield path, inside[0]

    def _item(self, path: str, folder: str, names: dict[str, str], templates: tuple[str, ...]) -> Item:
        """A picture with its captions. Raises ValueError for a class without a name."""
        name = _name(folder, names)
        if self.captions == "one":
            templates = (templates[zlib.crc32(path.encode()) % len(templates)],)
        narrations = (NarrationItem(str(number), fill(template, name)) for number, template in enumerate(templates))
        return Item(key_of_path(path), (well_formed(path),), tuple(narrations))

    def _names(self) -> dict[str, str]:
        """The first name of every class. Raises UserError for a line without a name."""
        names = {}
        for line in text_lines(self.names) if self.names else ():
            match = re.match(r"([^\s,]+)[\s,]+([^,\t]+)", line)
            if match is None:
                raise UserError(f"{self.names}: expected class and name, such as n01440764 tench, not {line!r:.80}")
            names[_plain(match[1])] = match[2].strip()
        return names

    def _templates(self) -> tuple[str, ...]:
        """Raises UserError for a template without its place for the name."""
        if self.templates is None:
            return TEMPLATES
        templates = tuple(text_lines(self.templates))
        if not templates or not all("{}" in template for template in templates):
            raise UserError(f"{self.templates}: every line must hold {{}}, where the name goes")
        return templates


def _name(folder: str, names: dict[str, str]) -> str:
    """What the class of a folder is called. Raises ValueError for one without a name."""
    if names and _plain(folder) not in names:
        raise ValueError(f"no name for the class {folder!r}")
    return names.get(_plain(folder)) or folder.replace("_", " ").replace("-", " ").strip()


def fill(template: str, name: str) -> str:
    """The template with the name, and "an" before a vowel."""
    if name[:1].lower() in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace("{}", name)


def _plain(folder: str) -> str:
    """A class's id without what no folder can be called: /m/011k07, m_011k07 and m-011k07 are the same."""
    return re.sub(r"[\W_]", "", folder)
