"""Shards: records on disk, written once, read at random by one `pread` each.

    00000.tar       plain uncompressed tar: KEY.safetensors, then KEY.jpg, KEY.1.jpg, KEY.2.jpg for pictures 0, 1, 2
    00000.npy       index: one row a sample (record x narration), in the order of the tar; see INDEX
    00000.json      receipt, written last: counts, bytes, hashes, failures. It exists: the shard is complete
    manifest.json   last of all: every receipt, the extractors, the widths. It exists: the folder is complete

Records go in by ShardWriter, one writer a shard, in source order. Which source rows make a shard is fixed beforehand,
so a row that fails leaves a failure in its own shard's receipt and shifts no other. Equal records give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from opt.config import UserError
from opt.data.encoding import block_padding, decode, encode, encode_pictures, member_header, member_key, read_header
from opt.data.manifest import LENGTHS, Failure, Receipt, read_manifest, write_receipt
from opt.data.record import Lengths, Record, RecordError, Sample, check
from opt.files import open_atomic, sha256, write_atomic

OPEN_SHARDS = 256
"""Shards a reader holds open at once (two files each), below the usual limit of 1024 open files."""

INDEX = np.dtype(
    [
        ("offset", "<u8"),  # where the safetensors member's data begins in the tar
        ("jpeg_offset", "<u8"),  # where the first jpeg's data begins; the others follow in the same span
        ("key", "<u8"),  # key_hash
        ("size", "<u4"),  # bytes of the safetensors member
        ("jpeg_size", "<u4"),  # bytes from the first jpeg's first byte to the last one's last; 0 without jpegs
        ("crc", "<u4"),  # crc32 of the safetensors member
        ("jpeg_crc", "<u4"),  # crc32 of the span of jpegs
        ("words", "<u2"),
        ("regions", "<u2"),
        ("frames", "<u2"),
        ("codes", "<u2"),
        ("narration", "<i2"),  # number in the record; -1: the record has none
    ]
)
"""One row of an index: 50 bytes."""


class DamagedRecord(UserError):
    """The bytes of a record are not those that were written."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(
            f"{path}: the bytes of key {key!r} are damaged (their checksum differs); `opt shards verify {path.parent} "
            f"--deep` lists all damage; delete {path.with_suffix('.json').name} and extract again to mend it"
        )
        self.path, self.key = path, key


def key_hash(key: str) -> int:
    """The key as 64 bits (BLAKE2b): tells pictures apart without reading them."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class ShardWriter:
    """Writes one shard; nothing of it appears before the `with` block ends without an error.

        with ShardWriter(folder, shard_name(3)) as shard:
            shard.write(record)
            shard.fail(key, "the picture is broken: ...")

    A shard of that name is replaced, its receipt removed first.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._rows: list[tuple[int, ...]] = []
        self._keys: set[str] = set()
        self._failures: list[Failure] = []
        self._hash = hashlib.sha256()
        self._offset = 0
        self._widths = {"region_width": 0, "speech_width": 0, "frame_rate": 0.0}

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.name}.json").unlink(missing_ok=True)
        self._stack = ExitStack()
        self._tar = self._stack.enter_context(open_atomic(self.folder / f"{self.name}.tar"))
        return self

    def write(self, record: Record) -> None:
        """Append a record. Raises RecordError, having written nothing of it, when it breaks the contract."""
        check(record)
        if record.key in self._keys:
            raise RecordError(f"record {record.key!r}: this key is in the shard already")
        widths = _widths(record, self._widths)
        name = f"{record.key}.safetensors"
        content = encode(record)
        pictures, jpeg_start, jpegs = encode_pictures(record)
        header = member_header(name, len(content))
        offset = self._offset + len(header)
        jpeg_offset = offset + len(content) + len(block_padding(len(content))) + jpeg_start if jpegs else 0
        rows = _index_rows(record, offset, content, jpeg_offset, jpegs)
        self._append(header, content, block_padding(len(content)), pictures)
        self._rows += rows
        self._keys.add(record.key)
        self._widths = widths

    def fail(self, key: str, reason: str) -> None:
        """Note that a source row, or a part of it, could not be used, and why. It goes into the receipt."""
        self._failures.append(Failure(key, reason))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # two empty blocks end a tar, filled up to its usual record of 20 blocks
            self._append(bytes(1024 + -(self._offset + 1024) % tarfile.RECORDSIZE))
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self._finish()

    def _append(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._tar.write(piece)
            self._hash.update(piece)
            self._offset += len(piece)

    def _finish(self) -> None:
        table = np.array(self._rows, INDEX)
        file = io.BytesIO()
        np.save(file, table, allow_pickle=False)
        index = file.getvalue()
        write_atomic(self.folder / f"{self.name}.npy", index)
        self.receipt = Receipt(
            name=self.name,
            records=len(self._keys),
            samples=len(table),
            bytes=self._offset,
            index_bytes=len(index),
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            totals={name: int(table[name].sum(dtype=np.int64)) for name in LENGTHS},
            failures=tuple(self._failures),
            **self._widths,  # type: ignore[arg-type]
        )
        write_receipt(self.folder, self.receipt)


class ShardReader:
    """Samples of a complete folder by number. Picklable; safe to use on both sides of a fork; memory stays flat."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._starts = np.cumsum([0] + [shard.samples for shard in self.manifest.shards])
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        self._checked: set[int] = set()
        """Shards whose index has been compared with its hash: once a reader, 50 bytes a sample."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Names this data in results: SHA-256 over all shards' hashes."""
        return self.manifest.fingerprint

    @property
    def lengths(self) -> Lengths:
        """Stored sizes of every sample, int64 (n,) each. Read from the index files at each call."""
        columns = {name: self.column(name).astype(np.int64) for name in LENGTHS}
        return Lengths(**columns)

    @property
    def key_hash(self) -> np.ndarray:
        """`key_hash(key)` of every sample, uint64 (n,). Read from the index files at each call."""
        return self.column("key")

    def column(self, name: str) -> np.ndarray:
        """One column of INDEX over all samples, (n,). Read from the index files at each call."""
        columns = [self._files(shard)[1][name] for shard in range(len(self.manifest.shards))]
        return np.concatenate([np.zeros(0, INDEX[name]), *columns])

    def sample(self, number: int, jpeg: bool = False) -> Sample:
        """Sample `number`, in 0..len-1; jpegs only on request. Raises UserError when its bytes are damaged."""
        row, record = self._read(number, jpeg)
        chosen = int(row["narration"])
        if chosen < 0:
            return Sample(record.key, record.pictures)
        narration = record.narrations[chosen]
        return Sample(record.key, record.pictures, chosen, narration.narration_id, narration.caption, narration.speech)

    def record(self, number: int, jpeg: bool = False) -> Record:
        """The whole record that sample `number` belongs to. Raises UserError when its bytes are damaged."""
        return self._read(number, jpeg)[1]

    def keys(self) -> Iterator[str]:
        """The key of every sample, in order (a key repeats for each narration). Reads no features."""
        for _, header in self._headers():
            yield header["key"]

    def captions(self) -> Iterator[str]:
        """Every caption, in the order of samples. Reads no features."""
        for row, header in self._headers():
            caption = header["narrations"][row["narration"]]["caption"] if row["narration"] >= 0 else None
            if caption is not None:
                yield caption

    def _headers(self) -> Iterator[tuple[np.void, dict[str, Any]]]:
        for shard in range(len(self.manifest.shards)):
            tar, index = self._files(shard)
            for row in index:
                if row["narration"] <= 0:  # the first sample of its record
                    try:
                        header = read_header(tar, int(row["offset"]))
                        sound = key_hash(header["key"]) == row["key"]
                        sound &= all("caption" in told for told in header["narrations"])
                    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
                        raise self._damaged(shard, tar, row) from error
                    if not sound:
                        raise self._damaged(shard, tar, row)
                yield row, header

    def _read(self, number: int, jpeg: bool) -> tuple[np.void, Record]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        tar, index = self._files(shard)
        row = index[number - self._starts[shard]]
        content = self._bytes(shard, tar, row, "")
        return row, decode(content, self._bytes(shard, tar, row, "jpeg_") if jpeg else None)

    def _bytes(self, shard: int, tar: int, row: np.void, kind: str) -> bytearray:
        """One pread, checked: the record (kind "") or its jpegs (kind "jpeg_")."""
        content = bytearray(int(row[f"{kind}size"]))
        got = os.preadv(tar, [content], int(row[f"{kind}offset"])) if content else 0
        if got != len(content) or zlib.crc32(content) != row[f"{kind}crc"]:
            raise self._damaged(shard, tar, row)
        return content

    def _damaged(self, shard: int, tar: int, row: np.void) -> DamagedRecord:
        return DamagedRecord(
            self.folder / f"{self.manifest.shards[shard].name}.tar", member_key(tar, int(row["offset"]))
        )

    def _files(self, shard: int) -> tuple[int, np.ndarray]:
        """Descriptor of the tar and memory map of the index; the shard used longest ago is closed for a new one."""
        if shard not in self._open:
            receipt = self.manifest.shards[shard]
            path = self.folder / receipt.name
            try:
                if shard not in self._checked and sha256(path.with_suffix(".npy")) != receipt.index_sha256:
                    raise UserError(
                        f"{path.with_suffix('.npy')} is damaged (its SHA-256 differs); delete {receipt.name}.json and "
                        "extract again to mend it"
                    )
                index = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
                tar = os.open(path.with_suffix(".tar"), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}; the manifest lists this shard") from error
            self._checked.add(shard)
            self._open[shard] = (tar, index)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(shard)
        return self._open[shard]

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path]]:
        return ShardReader, (self.folder,)

    def __del__(self) -> None:
        for tar, _ in getattr(self, "_open", {}).values():
            os.close(tar)


def _index_rows(record: Record, offset: int, content: bytes, jpeg_offset: int, jpegs: bytes) -> list[tuple[int, ...]]:
    """The index rows of one record, one a narration, fields as in INDEX."""
    regions = sum(len(picture.regions) for picture in record.pictures if picture.regions is not None)
    codes = sum(picture.codes.size for picture in record.pictures if picture.codes is not None)
    checksums = (zlib.crc32(content), zlib.crc32(jpegs))
    place = (offset, jpeg_offset, key_hash(record.key), len(content), len(jpegs), *checksums)
    rows: list[tuple[int, ...]] = []
    for number, narration in enumerate(record.narrations):
        words = len(re.findall(r"\w+|[^\w\s]", narration.caption or ""))
        frames = 0 if narration.speech is None else len(narration.speech)
        rows.append((*place, words, regions, frames, codes, number))
    rows = rows or [(*place, 0, regions, 0, codes, -1)]
    for row in rows:
        for value, name in zip(row, INDEX.names or (), strict=True):
            if value > np.iinfo(INDEX[name]).max:
                raise RecordError(f"record {record.key!r}: {name} = {value} exceeds {np.iinfo(INDEX[name]).max}")
    return rows


def _widths(record: Record, before: dict[str, float]) -> dict[str, float]:
    """Feature widths after this record, RecordError where one differs from those before it; the highest frame rate."""
    seen = [("region_width", picture.regions.shape[1]) for picture in record.pictures if picture.regions is not None]
    for narration in record.narrations:
        if narration.speech is not None:
            seen.append(("speech_width", narration.speech.shape[1]))
    rates = [narration.frame_rate for narration in record.narrations if narration.speech is not None]
    after = {**before, "frame_rate": float(max([before["frame_rate"], *rates]))}
    for name, value in seen:
        if after[name] not in (0, value):
            raise RecordError(f"record {record.key!r}: {name} is {value}, the records before it have {after[name]}")
        after[name] = value
    return after
