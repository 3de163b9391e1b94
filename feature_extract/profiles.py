"""What is stored of a sample: three sets of settings, and what a sample weighs under the one at hand.

    full      every frame of the speech network, the detector's scores of all classes
    standard  at most 256 frames at 10 a second, the five best classes of a region
    compact   the same frames, the best class only, features as int8 with a scale a row
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

from feature_extract.extractors import Extractors
from feature_extract.runners.supervise import Tally
from feature_extract.work import Setup, extract_row, one_thread, read_row
from opt.data.encoding import block_padding, encode, encode_pictures
from opt.data.record import Record
from opt.progress import counted, in_bytes

LONGEST = 65_535
"""What the index of a shard can count of regions or frames."""
PROFILES: dict[str, dict[str, Any]] = {
    "full": {"frames_per_second": 0.0, "max_frames": LONGEST, "top_classes": LONGEST, "int8": False},
    "standard": {"frames_per_second": 10.0, "max_frames": 256, "top_classes": 5, "int8": False},
    "compact": {"frames_per_second": 10.0, "max_frames": 256, "top_classes": 0, "int8": True},
}
WEIGHED = 8
"""Rows, evenly spread, that are extracted to tell what a row weighs."""


class Weight(NamedTuple):
    """Mean bytes that a row takes in a shard, over the `usable` ones of the rows tried; what was lost of those."""

    bytes: float
    usable: int
    tried: int
    tally: Tally


def weigh(setup: Setup, extractors: Extractors) -> Weight:
    """What a row weighs, judged by a few."""
    sizes: list[int] = []
    tally = Tally()
    places = sorted({place * setup.plan.size // WEIGHED for place in range(WEIGHED)})
    with one_thread():
        for place in places:
            (row,) = setup.plan.rows(place, place + 1)
            record, failures = extract_row(read_row(row, setup, extractors), extractors)
            tally.add(failures)
            sizes += [] if record is None else [_size(record, setup.int8)]
    return Weight(sum(sizes) / max(1, len(sizes)), len(sizes), len(places), tally)


def forecast(out: Path, rows: int, weight: Weight | None, profile: str) -> str:
    """What the job is going to write, in a sentence, and a warning where the disk has less room.

    weight: None when the process that weighed did not end well.
    """
    if weight is None:
        return f"profile {profile}: what a row weighs is not known, the rows tried ended a process or held it up"
    if not weight.usable:
        return "\n".join([f"none of the {counted(weight.tried, 'row')} tried can be used:", *weight.tally.table()])
    folder = next(place for place in (out, *out.absolute().parents) if place.exists())
    free, whole = shutil.disk_usage(folder).free, rows * weight.bytes
    short = "; THE DISK HAS LESS" if whole > free else ""
    return (f"profile {profile}: {weight.bytes:,.0f} bytes a row (mean of {weight.usable}), about {in_bytes(whole)} "
            f"for {counted(rows, 'row')}; {in_bytes(free)} are free{short}")


def _size(record: Record, int8: bool) -> int:
    """Bytes that the record takes in a tar."""
    parts = (encode(record, int8), encode_pictures(record))
    return sum(BLOCKSIZE + len(part) + len(block_padding(len(part))) for part in parts if part)
