"""What is stored of a sample: three sets of settings, and what a sample weighs under the one at hand.

    full      every frame of the speech network, the detector's scores of all classes
    standard  at most 256 frames at 10 a second, the five best classes of a region
    compact   the same frames, the best class only, features as int8 with a scale a row
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

from feature_extract.assemble import Media, make_record, read_media
from feature_extract.extractors import Extractors
from feature_extract.plan import Plan
from feature_extract.sources.item import Item
from feature_extract.work import one_thread
from opt.data.encoding import block_padding, encode, encode_pictures
from opt.data.record import RecordError, check

LONGEST = 65_535
"""What the index of a shard can count of regions or frames."""
PROFILES: dict[str, dict[str, Any]] = {
    "full": {"frames_per_second": 0.0, "max_frames": LONGEST, "top_classes": LONGEST, "int8": False},
    "standard": {"frames_per_second": 10.0, "max_frames": 256, "top_classes": 5, "int8": False},
    "compact": {"frames_per_second": 10.0, "max_frames": 256, "top_classes": 0, "int8": True},
}
WEIGHED = 8
"""Rows, evenly spread, that are extracted to tell what a row weighs."""


def weight(plan: Plan, root: Path, extractors: Extractors, jpeg: bool, int8: bool) -> tuple[float, int]:
    """Bytes that a usable row takes in a shard, from a few of them, and how many those were (0: none was usable)."""
    sizes: list[int] = []
    with one_thread():
        for place in sorted({place * plan.size // WEIGHED for place in range(WEIGHED)}):
            (row,) = plan.rows(place, place + 1)
            if isinstance(row.item, Item):
                sizes += _size(row.item, root, extractors, jpeg, int8)
    return sum(sizes) / max(1, len(sizes)), len(sizes)


def forecast(out: Path, rows: int, bytes_a_row: float, measured: int, profile: str) -> str:
    """What the job is going to write, in a sentence, and a warning where the disk has less room."""
    folder = next(place for place in (out, *out.absolute().parents) if place.exists())
    free, whole = shutil.disk_usage(folder).free, rows * bytes_a_row
    short = "; THE DISK HAS LESS" if whole > free else ""
    return (f"profile {profile}: {bytes_a_row:,.0f} bytes a row (mean of {measured} of them), "
            f"{whole / 1e9:,.2f} GB for {rows:,} rows; {free / 1e9:,.1f} GB are free{short}")


def _size(item: Item, root: Path, extractors: Extractors, jpeg: bool, int8: bool) -> list[int]:
    """Bytes that the item's record takes in a tar, in a list; empty when it has none."""
    max_seconds = extractors.audio.settings.max_seconds if extractors.audio is not None else None
    media: Media = read_media(item, root, jpeg, max_seconds)
    record, _ = make_record(media, extractors)
    try:
        parts = [encode(check(record), int8), encode_pictures(record)] if record is not None else []
    except RecordError:
        return []
    return [sum(BLOCKSIZE + len(part) + len(block_padding(len(part))) for part in parts if part)] if parts else []
