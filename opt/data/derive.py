"""Folders of shards made from other folders: records taken over as their stored bytes, or left out with a reason.

    Part, one a shard to be --copy_parts--> shards and receipts --> manifest.json, last

What `opt shards merge` and `opt shards dedup` share. The same command again goes on where it stopped: a part with a
receipt is done. Nothing is decoded, so memory stays flat and features stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opt.data.manifest import MANIFEST, Manifest, Receipt, read_receipt, write_manifest
from opt.data.shards import ShardWriter
from opt.data.stored import StoredShard
from opt.progress import progress


@dataclass(frozen=True)
class Part:
    """One shard to be: `name`, of the records of a complete shard less `dropped` (place in that shard -> reason)."""

    name: str
    folder: Path
    receipt: Receipt
    dropped: Mapping[int, str] = field(default_factory=dict)


def copy_parts(out: Path, parts: Sequence[Part], like: Manifest, label: str) -> Manifest:
    """Make every part that has no receipt yet, then the manifest, with the extractors and names of `like`.

    Raises UserError where a record's bytes are damaged.
    """
    todo = [part for part in parts if read_receipt(out, part.name) is None]
    if todo:
        (out / MANIFEST).unlink(missing_ok=True)
    total = sum(part.receipt.records for part in parts)
    done = total - sum(part.receipt.records for part in todo)
    with progress(label, total=total, done=done, unit="records") as bar:
        for part in todo:
            _copy(out, part)
            bar.advance(part.receipt.records)
    return write_manifest(
        out,
        [part.name for part in parts],
        like.extractors,
        like.region_classes,
        like.codebook,
        like.region_attributes,
        like.speech_codebooks,
    )


def _copy(out: Path, part: Part) -> None:
    """One shard: the failures it had, its records in their order, a failure for each that is left out."""
    int8 = part.receipt.storage == "int8"
    with StoredShard(part.folder, part.receipt) as shard, ShardWriter(out, part.name, int8) as writer:
        for failure in part.receipt.failures:
            writer.fail(failure.key, failure.reason)
        for place in range(len(shard.firsts)):
            if place in part.dropped:
                writer.fail(shard.metadata(shard.rows(place)[0])["key"], part.dropped[place])
            else:
                writer.copy(shard, place)
