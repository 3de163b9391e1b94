"""Looking at shards: `opt shards verify` finds damage, `opt shards inspect` shows what a folder holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from opt.config import UserError
from opt.data.encoding import PICTURE_ARRAYS, REGION_ARRAYS, member_key, named_arrays, parse_header, read_header
from opt.data.manifest import AGAIN, LENGTHS, Manifest, Receipt, by_reason, is_intact
from opt.data.record import Record, check
from opt.data.shards import ShardReader
from opt.data.stored import INDEX, DamagedRecord, key_hash
from opt.files import sha256
from opt.progress import counted, in_bytes, progress

SHOWN = 20
"""How many problems or failures are listed before the rest is only counted."""
MEASURED = 200
"""Records, evenly spread, from which `inspect` takes the share of each part in the bytes."""


@dataclass(frozen=True)
class VerifyConfig:
    """What to verify."""

    folder: Positional[Path]
    """Folder of shards, as written by `opt extract`."""
    deep: bool = False
    """Read and check every byte; without it, sizes, counts and the index."""


@dataclass(frozen=True)
class InspectConfig:
    """What to show."""

    folder: Positional[Path]
    """Folder of shards, as written by `opt extract`."""
    number: int = 3
    """Samples to show, evenly spread over the folder."""


def verify(config: VerifyConfig) -> None:
    """Check a folder of shards; exit with a list of all damage when there is any.

    Example: opt shards verify runs/demo/shards/train --deep
    """
    reader = ShardReader(config.folder)
    manifest = reader.manifest
    problems: list[str] = []
    first = 0
    with progress("verify", total=len(manifest.shards), unit="shards") as bar:
        for receipt in manifest.shards:
            problems += _shard_problems(reader, receipt, first, config.deep)
            first += receipt.samples
            bar.advance(note=f"{len(problems)} problems" if problems else None)
    if not problems:
        problems += _repeated_keys(reader)
    if problems:
        rest = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *rest])
        raise UserError(
            f"{config.folder}: {len(problems)} problems\n  {listed}\n"
            f"Delete the .json of each shard named and {AGAIN} to mend them."
        )
    depth = "every byte as written" if config.deep else "sizes, counts and index agree (--deep reads every byte)"
    print(f"{config.folder}: {_counts(manifest)}: {depth}")


def inspect(config: InspectConfig) -> None:
    """Show what a folder of shards holds: who made it, how much there is, and a few samples.

    Example: opt shards inspect runs/demo/shards/train --number 5
    """
    if config.number < 0:
        raise UserError(f"--number {config.number}: must be at least 0")
    reader = ShardReader(config.folder)
    print("\n".join([*_summary(reader), *_samples(reader, config.number)]))


def _shard_problems(reader: ShardReader, receipt: Receipt, first: int, deep: bool) -> Iterator[str]:
    """What is wrong with one shard, a line each. `first` is the number of its first sample."""
    folder = reader.folder
    tar, index = folder / f"{receipt.name}.tar", folder / f"{receipt.name}.npy"
    if not is_intact(folder, receipt):
        yield f"{receipt.name}.json: missing, or not what the manifest says"
    for path, size in ((tar, receipt.bytes), (index, receipt.index_bytes)):
        got = path.stat().st_size if path.exists() else None
        if got != size:
            yield f"{path.name}: {'missing' if got is None else f'{got:,} bytes'}, expected {size:,} bytes"
            return
    if deep and sha256(index) != receipt.index_sha256:
        yield f"{index.name}: bytes are damaged (SHA-256 differs)"
        if sha256(tar) != receipt.sha256:
            yield f"{tar.name}: bytes are damaged (SHA-256 differs); which keys cannot be told without the index"
        return
    try:
        rows = np.load(index, allow_pickle=False)
    except (ValueError, OSError) as error:
        yield f"{index.name}: not readable ({error})"
        return
    wrong = list(_index_problems(tar, rows, receipt))
    if deep and not wrong:
        wrong = list(_record_problems(reader, receipt, first + np.flatnonzero(rows["narration"] <= 0)))
        if not wrong and sha256(tar) != receipt.sha256:
            wrong = [f"{tar.name}: bytes between the records are damaged (SHA-256 differs)"]
    yield from wrong


def _index_problems(tar: Path, rows: np.ndarray, receipt: Receipt) -> Iterator[str]:
    """Where the index disagrees with the receipt, or with what lies in the tar at the places it names."""
    if rows.dtype != INDEX or rows.shape != (receipt.samples,):
        yield f"{receipt.name}.npy: {rows.shape} rows of {rows.dtype}, expected {receipt.samples} of an index"
        return
    totals = {name: int(rows[name].sum(dtype=np.int64)) for name in LENGTHS}
    if totals != receipt.totals:
        yield f"{receipt.name}.npy: sums of lengths are {totals}, expected {receipt.totals}"
    with tar.open("rb") as file:
        for row in rows[rows["narration"] <= 0]:
            begin = int(row["offset"])
            try:
                key = read_header(file.fileno(), begin)["key"]
            except (ValueError, KeyError, TypeError, OverflowError, OSError, MemoryError):
                key = None
            if key is None or key_hash(key) != row["key"]:
                found = member_key(file.fileno(), begin)
                yield f"{tar.name}: key {found!r} at byte {begin:,}: not the record that the index names"


def _record_problems(reader: ShardReader, receipt: Receipt, numbers: np.ndarray) -> Iterator[str]:
    """Records, given by a sample of each, whose bytes are not as written, or that do not keep the contract."""
    for number in numbers.tolist():
        try:
            record = check(reader.record(number, jpeg=True))
            yield from (f"{receipt.name}.tar: key {record.key!r}: {problem}" for problem in _unnamed(record, reader))
        except DamagedRecord as damaged:
            yield f"{Path(damaged.path).name}: key {damaged.key!r}: bytes are damaged (checksum differs)"
        except (ValueError, KeyError, TypeError) as error:  # RecordError, and what decoding nonsense can raise
            yield f"{receipt.name}.tar: sample {number}: {error}"


def _unnamed(record: Record, reader: ShardReader) -> Iterator[str]:
    """Ids of a record that stand for nothing, or on another grid: the manifest says what there is of each kind."""
    manifest, grid = reader.manifest, reader.manifest.codes_grid
    kinds = {"classes": manifest.region_classes, "top_classes": manifest.region_classes,
             "attributes": manifest.region_attributes}  # fmt: skip
    for name, ids in named_arrays(record).items():
        part, _, field = name.split(".")
        if field == "codes" and part == "narration":
            entries = list(manifest.speech_codebooks)
            if ids.shape[1] != len(entries) or (ids.max(0) >= entries).any():
                yield f"{name}: ids up to {ids.max(0).tolist()} of codebooks of {entries} entries"
        elif field == "codes" and grid and ids.shape != (grid, grid):
            yield f"{name}: {_shape(ids)}; the manifest says {grid} x {grid}"
        elif field in kinds or field == "codes":
            there = len(kinds[field]) if field in kinds else manifest.codebook
            if ids.size and ids.max() >= there:
                yield f"{name}: the id {ids.max()} of {there} that the manifest counts"


def _repeated_keys(reader: ShardReader) -> list[str]:
    """Keys that several records have: within a shard the writer refuses them, between shards only this sees them."""
    records = np.flatnonzero(reader.column("narration") <= 0)
    hashes = reader.key_hash[records]
    again = np.setdiff1d(np.arange(len(records)), np.unique(hashes, return_index=True)[1])
    return [f"key {reader.sample(number).key!r}: more than one record has it" for number in records[again].tolist()]


def _summary(reader: ShardReader) -> Iterator[str]:
    manifest = reader.manifest
    yield f"{reader.folder}: {_counts(manifest)}"
    yield f"  fingerprint {manifest.fingerprint}"
    for name, facts in manifest.extractors.items():
        yield f"  {name:8} {_line(facts)}"
    attributes = f" and {len(manifest.region_attributes)} attributes" if manifest.region_attributes else ""
    grid = f" on {manifest.codes_grid} x {manifest.codes_grid} places" if manifest.codebook else ""
    books = f" with codebooks of {list(manifest.speech_codebooks)}" if manifest.speech_codebooks else ""
    yield (
        f"  regions {manifest.region_width} wide in {len(manifest.region_classes)} classes{attributes}, speech "
        f"{manifest.speech_width} wide at {manifest.frame_rate:g} frames a second{books}, "
        f"{manifest.codebook} image codes{grid}"
    )
    yield f"  features stored as {manifest.storage}"
    yield "  records of " + ", ".join(f"{origin.name} {origin.split}".strip() for origin in manifest.origins)
    if manifest.split is not None:
        yield f"  part {manifest.split.part} of the frozen split {manifest.split.name}"
    yield f"  {len(manifest.failures)} failures"
    kinds = by_reason(manifest.failures)
    yield from (f"    {count:>8,}  {reason}" for reason, count in kinds.most_common(SHOWN))
    yield from (f"    {failure.key}: {failure.reason}" for failure in manifest.failures[:SHOWN])
    if not len(reader):
        return
    yield f"\n  {'lengths':8} {'absent':>7} {'least':>7} {'5 %':>7} {'median':>7} {'95 %':>7} {'most':>7}"
    for name in LENGTHS:
        values = getattr(reader.lengths, name)
        present = values[values > 0] if (values > 0).any() else values[:1]
        marks = np.percentile(present, [0, 5, 50, 95, 100]).round().astype(int)
        yield f"  {name:8} {np.mean(values == 0):>7.0%} " + " ".join(f"{mark:>7,}" for mark in marks)
    parts = _bytes_by_part(reader)
    yield "\n  bytes a record: " + ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())


def _samples(reader: ShardReader, number: int) -> Iterator[str]:
    for place in _spread(len(reader), number):
        record, sample = reader.record(place, jpeg=True), reader.sample(place)
        yield f"\n  sample {place}: key {record.key}, narration {sample.narration} of {len(record.narrations)}"
        for picture in record.pictures:
            held = {name: getattr(picture, name) for name in PICTURE_ARRAYS}
            arrays = [f"{name} {_shape(array)}" for name, array in held.items() if array is not None] or ["no features"]
            jpeg = f"jpeg {len(picture.jpeg):,} bytes" if picture.jpeg else "no jpeg"
            yield f"    picture  {picture.width} x {picture.height}, {', '.join(arrays)}, {jpeg}"
        yield f"    caption  {'absent' if sample.caption is None else sample.caption}"
        yield f"    speech   {_shape(sample.speech)}"
        if sample.narration >= 0 and (codes := record.narrations[sample.narration].codes) is not None:
            yield f"    codes    {_shape(codes)}"


def _bytes_by_part(reader: ShardReader) -> dict[str, float]:
    """Mean bytes on disk of each part of a record."""
    sizes: Counter[str] = Counter({"regions": 0, "codes": 0, "jpeg": 0, "speech": 0, "captions": 0})
    seen: set[str] = set()
    for number in _spread(len(reader), MEASURED):
        shard, row = reader.locate(number)
        metadata, tensors = parse_header(shard.content(row))
        if metadata["key"] in seen:
            continue
        seen.add(metadata["key"])
        for name, tensor in tensors.items():
            part, _, field, *_ = name.split(".")
            begin, end = tensor["data_offsets"]
            sizes["regions" if field in REGION_ARRAYS else "speech" if part == "narration" else "codes"] += end - begin
        sizes["jpeg"] += int(row["jpeg_size"])
        sizes["captions"] += sum(len((told["caption"] or "").encode()) for told in metadata["narrations"])
    return {name: size / len(seen) for name, size in sizes.items()}


def _spread(length: int, number: int) -> list[int]:
    """At most `number` distinct places in 0..length-1, evenly spread."""
    return sorted({int(place) for place in np.linspace(0, max(length - 1, 0), min(number, length))})


def _counts(manifest: Manifest) -> str:
    size = sum(shard.bytes + shard.index_bytes for shard in manifest.shards)
    counts = ((len(manifest.shards), "shard"), (manifest.records, "record"), (manifest.samples, "sample"))
    return ", ".join([*(counted(count, what) for count, what in counts), in_bytes(size)])


def _line(facts: Any) -> str:
    """An extractor's facts in one line: `name tiny, weights 1f0c..., size 8`."""
    if not isinstance(facts, dict):
        return str(facts)
    return ", ".join(f"{k} {v if isinstance(v, str | int | float) else json.dumps(v)}" for k, v in facts.items())


def _shape(array: np.ndarray | None) -> str:
    return "absent" if array is None else " x ".join(map(str, array.shape))
