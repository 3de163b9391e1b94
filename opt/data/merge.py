"""`opt shards merge`: several folders of shards, made by the same extractors, become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from opt.config import UserError
from opt.data.claim import claim
from opt.data.corpora import require_same
from opt.data.derive import Part, Piece, copy_parts
from opt.data.manifest import Manifest, shard_name
from opt.data.shards import ShardReader
from opt.lock import alone

REPEATED = "record: repeated key"


@dataclass(frozen=True)
class MergeConfig:
    """Which folders become one."""

    out: Positional[Path]
    """Folder of the merged shards; made when absent."""
    folders: Positional[tuple[Path, ...]]
    """Complete folders of shards, at least two, in the order in which their shards are to stand."""


def merge(config: MergeConfig) -> None:
    """Make one folder of shards out of several. Run again after a stop, it goes on.

    A key that an earlier folder has is left out and counted as a failure. Records are copied as they are stored.

    Example: opt shards merge runs/all runs/open-images runs/flickr30k
    """
    _check_folders(config)
    readers = [ShardReader(folder) for folder in config.folders]
    require_same(readers, whole=True)
    repeated = _repeated(readers)
    parts: list[Part] = []
    left_out = 0
    for reader in readers:
        for receipt in reader.manifest.shards:
            dropped = {place: f"{REPEATED} (the first is in {other})" for place, other in next(repeated).items()}
            parts.append(Part(shard_name(len(parts)), [Piece(reader.folder, receipt, dropped)]))
            left_out += len(dropped)
    with alone(config.out):
        claim(config.out, {"source": "opt shards merge", "folders": [reader.fingerprint for reader in readers]})
        manifest = copy_parts(config.out, parts, _manifest(readers), "merge")
    print(
        f"{config.out}: {manifest.records:,} records, {manifest.samples:,} samples in {len(manifest.shards)} shards "
        f"from {len(readers)} folders; {left_out:,} left out, their keys being repeated"
    )


def _check_folders(config: MergeConfig) -> None:
    """Raises UserError for fewer than two folders, one named twice, or one that is the output."""
    if len(config.folders) < 2:
        raise UserError(f"one folder is merged already; give at least two after {config.out}, which is written")
    places = [folder.resolve() for folder in config.folders]
    for number, folder in enumerate(config.folders):
        if places[number] in places[:number]:
            raise UserError(f"{folder} is named twice; name each folder once")
        if places[number] == config.out.resolve():
            raise UserError(f"{folder} is both read and written; the first folder named is the one that is written")


def _manifest(readers: Sequence[ShardReader]) -> Manifest:
    """What the merged folder says of itself as a whole: the origins of all, and no longer the part of one split."""
    origins = dict.fromkeys(origin for reader in readers for origin in reader.manifest.origins)
    return dataclasses.replace(readers[0].manifest, origins=tuple(origins), split=None)


def _repeated(readers: Sequence[ShardReader]) -> Iterator[dict[int, Path]]:
    """For every shard in order: place of each record whose key an earlier record has -> the folder of the first."""
    hashes = [reader.key_hash[reader.column("narration") <= 0] for reader in readers]
    _, index, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    first = index[inverse]
    again = np.flatnonzero(first != np.arange(len(first)))
    ends = np.cumsum([len(part) for part in hashes])
    start = 0
    for receipt in (receipt for reader in readers for receipt in reader.manifest.shards):
        here = again[np.searchsorted(again, start) : np.searchsorted(again, start + receipt.records)]
        yield {
            int(record - start): readers[int(np.searchsorted(ends, first[record], side="right"))].folder
            for record in here
        }
        start += receipt.records
