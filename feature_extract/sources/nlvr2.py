"""NLVR2: two photographs and a sentence that is true of them or not.

    train.json    {"identifier": "train-10171-0-0", "sentence", "label": "True", "left_url", "right_url"} a line
    images/train/<directory>/train-10171-0-img0.png and -img1.png; images/dev/ and images/test1/ without <directory>

Suhr et al., arXiv 1811.00491. A pair of pictures has one or two sentences; they become narrations of one record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.reading import (
    MALFORMED,
    decode,
    field,
    identifier,
    item_or_bad_row,
    key_of,
    numbered_lines,
    plain_name,
    required,
)


@dataclass(frozen=True)
class Source:
    """NLVR2: SPLIT.json (train, dev, test1) and images/SPLIT/."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """train, dev, test1 or test2."""
    sentences: Literal["true", "all", "none"] = "true"
    """Which sentences become narrations: a false one is no caption."""
    pictures: str = "images"
    """Folder that the splits' folders lie in; url: the addresses that the lines name, some of which are gone."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        plain_name(self.split)
        return [required(self.corpus / f"{self.split}.json")]

    def rows(self) -> Iterator[Item | BadRow]:
        [path] = self.files()
        seen = set[str]()  # pairs, so that one without a sentence to tell comes once
        for number, line in numbered_lines(path):
            row = item_or_bad_row(f"{path.name}:{number}", self._item, line)
            if isinstance(row, BadRow) or row.narrations or row.key not in seen:
                yield row
            if self.sentences != "all":
                seen.add(row.key)

    def questions(self) -> Iterator[dict[str, Any]]:
        """Every sentence, answered by true or false; the pairs of one sentence are a set. A malformed line is left out:
        `rows` has named it."""
        for _, line in numbered_lines(self.files()[0]):
            try:
                entry = json.loads(decode(line))
                pair, number = _pair(entry)
                sentence = f"{pair.rpartition('-')[0]}-{number}"
                question = {"image_id": key_of(pair), "question": field(entry, "sentence", str), "set": sentence}
                yield question | {"answers": [_label(entry)] if "label" in entry else []}
            except MALFORMED:
                continue

    def _item(self, line: bytes) -> Item:
        """A pair of pictures with one sentence. Raises one of MALFORMED."""
        entry = json.loads(decode(line))
        (pair, number), sentence = _pair(entry), field(entry, "sentence", str)
        said = self.sentences == "all" or self.sentences == "true" and _label(entry) == "true"
        narrations = (NarrationItem(number, sentence),) if said else ()
        return Item(key_of(pair), self._pictures(entry, pair), narrations)

    def _pictures(self, entry: Any, pair: str) -> tuple[str, str]:
        if self.pictures == "url":
            return field(entry, "left_url", str), field(entry, "right_url", str)
        folder = f"{self.pictures.rstrip('/')}/{self.split}"
        if "directory" in entry:
            folder = f"{folder}/{identifier(entry, 'directory')}"
        return f"{folder}/{pair}-img0.png", f"{folder}/{pair}-img1.png"


def _pair(entry: Any) -> tuple[str, str]:
    """`split-set-pair-sentence` as the pair's name and the sentence's number. Raises ValueError for another form."""
    pair, dash, number = field(entry, "identifier", str).rpartition("-")
    if not dash or not number.isdecimal():
        raise ValueError(f"identifier {entry['identifier']!r:.80} is not split-set-pair-sentence")
    return pair, number


def _label(entry: Any) -> str:
    """true or false, which the files write as "True" or "False"."""
    label = str(entry.get("label")).lower()
    if label not in ("true", "false"):
        raise ValueError(f"label {entry.get('label')!r:.80} is neither True nor False")
    return label
