"""`opt shards merge`: several folders of shards, made by the same extractors, become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from opt.config import UserError
from opt.data.claim import claim
from opt.data.derive import Part, copy_parts
from opt.data.manifest import Manifest, shard_name
from opt.data.shards import ShardReader
from opt.lock import alone

SAME = ("extractors", "storage", "region_classes", "region_attributes", "codebook", "speech_codebooks")
WIDTHS = ("region_width", "speech_width")
"""What the manifests of the folders must agree on; a width of 0, where no record has such features, says nothing."""
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
    _require_same(readers)
    repeated = _repeated(readers)
    parts: list[Part] = []
    for reader in readers:
        for receipt in reader.manifest.shards:
            dropped = {place: f"{REPEATED} (the first is in {other})" for place, other in next(repeated).items()}
            parts.append(Part(shard_name(len(parts)), reader.folder, receipt, dropped))
    with alone(config.out):
        claim(config.out, {"source": "opt shards merge", "folders": [reader.fingerprint for reader in readers]})
        manifest = copy_parts(config.out, parts, readers[0].manifest, "merge")
    left_out = sum(len(part.dropped) for part in parts)
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


def _require_same(readers: Sequence[ShardReader]) -> None:
    """Raises UserError that names what the first folder and another were not made alike in."""
    first, *others = readers
    for other in others:
        widths = [name for name in WIDTHS if getattr(first.manifest, name) and getattr(other.manifest, name)]
        alike = [_facts(reader.manifest, [*SAME, *widths]) for reader in (first, other)]
        if difference := _difference(alike[0], alike[1]):
            raise UserError(
                f"{first.folder} and {other.folder} do not go together: {difference}; only folders made by the same "
                "extractors become one"
            )


def _facts(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """The named facts; where weights lay is none of them when a hash says which they are."""
    facts = {name: getattr(manifest, name) for name in names}
    hashed = {kind: {name: value for name, value in about.items() if name != "weights"}
              for kind, about in manifest.extractors.items() if "weights_sha256" in about}  # fmt: skip
    return {**facts, "extractors": {**manifest.extractors, **hashed}}


def _difference(first: Any, second: Any, name: str = "") -> str:
    """The first place where two values differ, as "audio.settings.max_frames is 256, then 128"; "" where none does."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f"{name}.{key}".removeprefix(".")
            if difference := _difference(first.get(key), second.get(key), inner):
                return difference
        return ""
    if first == second:
        return ""
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) != len(second):
        return f"{name} has {len(first)} entries, then {len(second)}"
    if isinstance(first, tuple) and isinstance(second, tuple):
        place = next(number for number, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        return f"{name}[{place}] is {first[place]!r}, then {second[place]!r}"
    words = ["absent" if value is None else str(value) for value in (first, second)]
    return f"{name} is {words[0]}, then {words[1]}"


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
