"""What every source is: a corpus layout read as rows, in an order that never changes.

    annotation files --rows--> Item | BadRow | ...   one a narration or one a picture, as the files have them

A source opens no picture and no recording: that is the extractors' work, where a broken file is a recorded failure and
not the end of the job. It holds no more than a row in memory where its files allow that. Rows of one key with the same
pictures become one record, wherever they stand: the plan (feature_extract/plan.py) brings them together, and refuses
paths that lead out of the source's folder, so that no source needs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tyro.conf import Positional


@dataclass(frozen=True)
class NarrationItem:
    """One narration as the corpus lists it: `caption` as written, possibly empty; `recording` may not exist.

    recording: a path as seen from the source's `root`, or a URL.
    """

    narration_id: str
    caption: str | None = None
    recording: str | None = None


@dataclass(frozen=True)
class Item:
    """A row: a record's key, its pictures (paths as seen from the source's `root`, or URLs) and its narrations."""

    key: str
    pictures: tuple[str, ...] = ()
    narrations: tuple[NarrationItem, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row of the source that cannot be read. It keeps its place, so that what follows stays in the same shard."""

    key: str
    reason: str


class Source(Protocol):
    """A module of this folder has a frozen dataclass `Source`: these two fields first, then options of its own.

    Its docstring says which corpus it reads, and the files that must lie there.
    """

    corpus: Positional[Path]
    split: str

    @property
    def root(self) -> Path:
        """The folder that the paths of items are seen from."""

    def files(self) -> list[Path]:
        """What the rows are read from, files or listed folders: as long as none of them changes, nor do the rows.

        Raises UserError, saying what is expected, when they are not there.
        """

    def rows(self) -> Iterator[Item | BadRow]:
        """The rows of the split, in order."""


class QuestionSource(Source, Protocol):
    """A source that has questions about its pictures, too."""

    def questions(self) -> Iterator[dict[str, Any]]:
        """Lines of a questions file (opt/data/questions.py): image_id (the item's key), question, answers."""


class LabelSource(Source, Protocol):
    """A source that knows what is in its pictures."""

    def labels(self) -> Iterator[dict[str, Any]]:
        """Lines of a labels file (`opt eval classify --labels`): image_id (the item's key), labels."""


def clean_key(name: str) -> str:
    """A record key made from a corpus's own id: dots and slashes become hyphens."""
    return name.strip().replace(".", "-").replace("/", "-").replace("\\", "-")
