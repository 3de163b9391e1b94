"""Folders of shards made from other folders: records taken over as their stored bytes, or left out with a reason.

    Part, one a shard to be --copy_parts--> shards and receipts --> manifest.json, last

What `opt shards merge`, `dedup`, `split` and `units` share. The same command again goes on where it stopped: a part
with a receipt is done. Records are copied one by one as they are stored, so memory stays flat and features as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opt.data.manifest import MANIFEST, Manifest, Receipt, read_receipt, write_manifest
from opt.data.shards import ShardWriter
from opt.data.stored import StoredShard
from opt.progress import progress


@dataclass(frozen=True)
class Piece:
    """Records of a complete shard: all of them less `dropped` (place in that shard -> reason), or those at `places`.

    What is dropped, and the failures the shard had, become failures; what `places` leaves out lies in another part.
    """

    folder: Path
    receipt: Receipt
    dropped: Mapping[int, str] = field(default_factory=dict)
    places: Sequence[int] | None = None

    @property
    def records(self) -> int:
        """Records that are looked at: kept, or dropped."""
        return self.receipt.records if self.places is None else len(self.places)


@dataclass(frozen=True)
class Part:
    """One shard to be: `name`, and what it is made of."""

    name: str
    pieces: Sequence[Piece]

    @property
    def records(self) -> int:
        """Those of its pieces."""
        return sum(piece.records for piece in self.pieces)


More = Callable[[StoredShard, int], Mapping[str, np.ndarray]]
"""What the record at a place gets besides: arrays by the names they are stored under."""


def copy_parts(
    out: Path, parts: Sequence[Part], like: Manifest, label: str, more: More | None = None
) -> Manifest:
    """Make every part that has no receipt yet, then the manifest, with all that `like` says of its folder as a whole.

    Raises UserError where a record's bytes are damaged.
    """
    todo = [part for part in parts if read_receipt(out, part.name) is None]
    if todo:
        (out / MANIFEST).unlink(missing_ok=True)
    total = sum(part.records for part in parts)
    done = total - sum(part.records for part in todo)
    with progress(label, total=total, done=done, unit="records") as bar:
        for part in todo:
            with ShardWriter(out, part.name, like.storage == "int8") as writer:
                for piece in part.pieces:
                    _copy(piece, writer, more)
            bar.advance(part.records)
    return write_manifest(
        out,
        [part.name for part in parts],
        like.extractors,
        like.region_classes,
        like.codebook,
        like.region_attributes,
        like.speech_codebooks,
        like.origins,
        like.split,
    )


def _copy(piece: Piece, writer: ShardWriter, more: More | None) -> None:
    """The failures the shard had, its records in their order, a failure for each that is left out."""
    with StoredShard(piece.folder, piece.receipt) as shard:
        if piece.places is None:
            for failure in piece.receipt.failures:
                writer.fail(failure.key, failure.reason)
        for place in range(len(shard.firsts)) if piece.places is None else piece.places:
            if place in piece.dropped:
                writer.fail(shard.metadata(shard.rows(place)[0])["key"], piece.dropped[place])
            else:
                writer.copy(shard, place, more(shard, place) if more else None)
