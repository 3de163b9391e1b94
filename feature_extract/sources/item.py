"""What every source yields: items that name files, in an order that never changes.

A source is a small module with a function that reads one corpus layout and yields `Item`s lazily. It opens no picture
and no recording: that is the extractors' work, where a broken file is a recorded failure and not the end of the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NarrationItem:
    """One narration as the corpus lists it: `caption` as written, possibly empty; `recording` may not exist."""

    narration_id: str
    caption: str | None
    recording: Path | None


@dataclass(frozen=True)
class Item:
    """One future record: its key, its picture files and its narrations. `key` already obeys the record's rule."""

    key: str
    pictures: tuple[Path, ...]
    narrations: tuple[NarrationItem, ...]


@dataclass(frozen=True)
class BadRow:
    """A row of the source that cannot be read. It keeps its place, so that what follows stays in the same shard."""

    key: str
    reason: str


def clean_key(name: str) -> str:
    """A record key made from a corpus's own id: dots and slashes become hyphens."""
    return name.strip().replace(".", "-").replace("/", "-").replace("\\", "-")
