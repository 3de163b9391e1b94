"""`opt shards dedup`: a folder of shards without the records that show a test picture.

    FOLDER, --against TEST ... --hash--> OUT/hashes --find_copies--> records to drop --copy--> OUT

Localized Narratives and Visual Genome share pictures with COCO and Flickr30k, under other names and in other sizes: a
model trained on one must not have seen the test pictures of the other. Pictures are compared, never names: a key says
nothing outside its own corpus.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from opt.config import UserError
from opt.data.claim import check_claim, claim
from opt.data.derive import Part, Piece, copy_parts
from opt.data.manifest import Receipt
from opt.data.near_copies import HASHES, find_copies, picture_hash
from opt.data.shards import ShardReader
from opt.data.stored import StoredShard
from opt.files import write_atomic
from opt.lock import alone, remove_unfinished
from opt.progress import progress

FOLDER_OF_HASHES = "hashes"
EXACT, NEAR, UNREADABLE = (
    "dropped: exact copy of a test picture", "dropped: near copy of a test picture", "dropped: picture not readable",
)  # fmt: skip


@dataclass(frozen=True)
class DedupConfig:
    """What to clear of which test pictures."""

    folder: Positional[Path]
    """Folder of shards to clear, as written by `opt extract`, with pictures stored (--jpeg)."""
    against: tuple[Path, ...]
    """Folders of shards whose pictures must not remain."""
    out: Path
    """Folder of the cleared shards; made when absent."""
    distance: int = 12
    """Pictures are near copies when at most so many of 64 bits differ in their perceptual hashes; 0 to 20."""
    workers: int = 2
    """Threads that decode and hash pictures."""
    dry_run: bool = False
    """Only list what would go; the hashes stay in --out for the run itself."""


def dedup(config: DedupConfig) -> None:
    """Drop the records that show an exact or near copy of a test picture. Run again after a stop, it goes on.

    Example: opt shards dedup runs/open-images --against runs/coco-test runs/flickr30k-test --out runs/clear
    """
    _check(config)
    reader, *tests = (ShardReader(folder) for folder in (config.folder, *config.against))
    if any(reader.fingerprint == test.fingerprint for test in tests):
        raise UserError(f"{config.folder} is one of those it is to be cleared of; name the test folders --against")
    settings = {"source": "opt shards dedup", "folder": reader.fingerprint, "distance": config.distance,
                "against": [test.fingerprint for test in tests]}  # fmt: skip
    with alone(config.out):
        check_claim(config.out, settings)
        _hash_all(config, [reader, *tests])
        find = TestPictures(config.out, tests, config.distance)
        pieces = [Piece(reader.folder, receipt, find.copies(receipt)) for receipt in reader.manifest.shards]
        if not config.dry_run:
            claim(config.out, settings)
            parts = [Part(piece.receipt.name, [piece]) for piece in pieces]
            copy_parts(config.out, parts, reader.manifest, "dedup")
    if config.dry_run:
        for piece in pieces:
            with StoredShard(piece.folder, piece.receipt) as shard:
                for place, reason in piece.dropped.items():
                    print(f"{shard.keys[place]}: {reason}")
    print(_summary(config, reader, pieces))


class TestPictures:
    """The hashed pictures of the test folders, and which pictures of a shard copy one of them."""

    __test__ = False  # for pytest: this is no test

    def __init__(self, out: Path, tests: Sequence[ShardReader], distance: int) -> None:
        self.out, self.distance = out, distance
        self.shards = [(test.folder, receipt) for test in tests for receipt in test.manifest.shards]
        tables = [_read_hashes(out, receipt) for _, receipt in self.shards]
        self.table = np.concatenate([np.zeros(0, HASHES), *tables])
        self.ends = np.cumsum([len(table) for table in tables])
        if not len(self.table):
            raise UserError("the folders named --against hold no picture; give those whose pictures are to be kept out")
        if not self.table["readable"].all():
            folder, key = self.named(int(np.argmin(self.table["readable"])))
            raise UserError(f"{folder}: the picture of {key!r} cannot be read, so what copies it cannot be found")

    def copies(self, receipt: Receipt) -> dict[int, str]:
        """Place -> reason, for the records of a hashed shard that are to go."""
        table = _read_hashes(self.out, receipt)
        dropped = {int(place): UNREADABLE for place in table["place"][~table["readable"]]}
        for picture, test, distance, exact in zip(*find_copies(table, self.table, self.distance), strict=True):
            folder, key = self.named(int(test))
            details = f"{folder.name}/{key}" if exact else f"{folder.name}/{key}, distance {distance}"
            dropped[int(table["place"][picture])] = f"{EXACT if exact else NEAR} ({details})"
        return dict(sorted(dropped.items()))

    def named(self, test: int) -> tuple[Path, str]:
        """Folder and key of a row of the table."""
        folder, receipt = self.shards[int(np.searchsorted(self.ends, test, side="right"))]
        with StoredShard(folder, receipt) as shard:
            return folder, shard.metadata(shard.rows(int(self.table["place"][test]))[0])["key"]


def hash_shard(folder: Path, receipt: Receipt) -> np.ndarray:
    """The hashes of every stored picture of a shard, (P,) HASHES. Raises UserError where a picture is not stored."""
    rows = []
    with StoredShard(folder, receipt) as shard:
        for place, first in enumerate(shard.firsts):
            for jpeg in shard.jpegs(shard.index[first]):
                if jpeg is None:
                    key = shard.metadata(shard.index[first])["key"]
                    raise UserError(f"{shard.path}: {key!r} is stored without its picture; extract again with --jpeg")
                rows.append((place, *picture_hash(jpeg)))
    return np.array(rows, HASHES)


def _check(config: DedupConfig) -> None:
    """Raises UserError for values out of range and folders that are read and written."""
    if not 0 <= config.distance <= 20:
        raise UserError(f"--distance {config.distance}: must be 0 to 20; different pictures are 32 bits apart")
    if not config.against:
        raise UserError("--against names no folder; give those whose pictures are to be kept out")
    if config.workers < 1:
        raise UserError(f"--workers {config.workers}: must be at least 1")
    if config.out.resolve() in [folder.resolve() for folder in (config.folder, *config.against)]:
        raise UserError(f"--out {config.out} is one of the folders that are read; choose another")


def _hash_all(config: DedupConfig, readers: Sequence[ShardReader]) -> None:
    """Write the hashes of every shard that has none in the output folder yet."""
    shards = {receipt.sha256: (reader.folder, receipt) for reader in readers for receipt in reader.manifest.shards}
    todo = [shard for shard in shards.values() if not _hashes_path(config.out, shard[1]).exists()]
    (config.out / FOLDER_OF_HASHES).mkdir(exist_ok=True)
    remove_unfinished(config.out / FOLDER_OF_HASHES)
    total = sum(receipt.records for _, receipt in shards.values())
    done = total - sum(receipt.records for _, receipt in todo)
    with progress("hash pictures", total=total, done=done, unit="records") as bar:
        pool = ThreadPoolExecutor(config.workers)
        try:
            for records in pool.map(partial(_hash_to_file, config.out), todo):
                bar.advance(records)
        finally:
            pool.shutdown(cancel_futures=True)


def _hash_to_file(out: Path, shard: tuple[Path, Receipt]) -> int:
    file = io.BytesIO()
    np.save(file, hash_shard(*shard), allow_pickle=False)
    write_atomic(_hashes_path(out, shard[1]), file.getvalue())
    return shard[1].records


def _read_hashes(out: Path, receipt: Receipt) -> np.ndarray:
    path = _hashes_path(out, receipt)
    try:
        return np.load(path, allow_pickle=False).astype(HASHES, casting="no", copy=False)
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the same command again") from error


def _hashes_path(out: Path, receipt: Receipt) -> Path:
    return out / FOLDER_OF_HASHES / f"{receipt.sha256[:32]}.npy"


def _summary(config: DedupConfig, reader: ShardReader, pieces: Sequence[Piece]) -> str:
    counts = Counter(reason.partition(" (")[0] for piece in pieces for reason in piece.dropped.values())
    verb = "would drop" if config.dry_run else "dropped"
    left = reader.manifest.records - counts.total()
    listed = "".join(f"\n  {count:>8,}  {reason.removeprefix('dropped: ')}" for reason, count in counts.items())
    return f"{config.out}: {verb} {counts.total():,} of {reader.manifest.records:,} records, {left:,} remain{listed}"
