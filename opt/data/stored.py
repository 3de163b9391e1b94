"""One shard on disk: a tar of records and its index, opened by the shard's receipt.

    00000.tar       plain uncompressed tar: KEY.safetensors, then KEY.jpg, KEY.1.jpg, KEY.2.jpg for pictures 0, 1, 2
    00000.npy       index: one row a sample (record x narration), in the order of the tar; see INDEX

What a ShardReader has many of: two open files each, and no memory. Alone it serves to take records over as they are
stored (`ShardWriter.copy`), also from a folder that has no manifest yet. A record is named by its place: 0 for the
first of the shard.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from opt.config import UserError
from opt.data.encoding import decode, member_key, read_header
from opt.data.manifest import AGAIN, Receipt
from opt.data.record import Record
from opt.files import sha256

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
    """The bytes of a record are not those that were written. path: the tar's, or its URL."""

    def __init__(self, path: Path | str, key: str) -> None:
        if isinstance(path, Path):
            way_out = (f"`opt shards verify {path.parent} --deep` lists all damage; delete "
                       f"{path.with_suffix('.json').name} and {AGAIN} to mend it")
        else:
            way_out = "what lies there was replaced or damaged since its manifest was written; start again, or mend it"
        super().__init__(f"{path}: the bytes of key {key!r} are damaged (their checksum differs); {way_out}")
        self.path, self.key = path, key

    def __reduce__(self) -> tuple[type[DamagedRecord], tuple[Path | str, str]]:  # workers say it to their parent
        return DamagedRecord, (self.path, self.key)


def key_hash(key: str) -> int:
    """The key as 64 bits (BLAKE2b): tells pictures apart without reading them."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class StoredShard:
    """The records of one shard, which its receipt says is complete.

        with StoredShard(folder, receipt) as shard:
            writer.copy(shard, shard.keys.index("000000391895"))

    The SHA-256 of its index is compared with the receipt's unless `trusted`. Index rows are read from the file each
    time, never mapped: the pages of a map would count as this process's memory, and grow with the samples it saw.
    Raises UserError when a file is missing, or the index is not the one that was written. Safe to read in threads.
    """

    _index = _tar = -1

    def __init__(self, folder: Path, receipt: Receipt, trusted: bool = False) -> None:
        self.receipt = receipt
        self.path = folder / f"{receipt.name}.tar"
        index = folder / f"{receipt.name}.npy"
        try:
            if not trusted and sha256(index) != receipt.index_sha256:
                raise UserError(
                    f"{index} is damaged (its SHA-256 differs); delete {receipt.name}.json and {AGAIN} to mend it"
                )
            self._index = os.open(index, os.O_RDONLY | os.O_CLOEXEC)
            self._tar = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; its receipt says that it is there") from error

    def __enter__(self) -> StoredShard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back; what was read stays."""
        for file in (self._index, self._tar):
            if file >= 0:
                os.close(file)
        self._index = self._tar = -1

    __del__ = close

    def index_rows(self, first: int, end: int) -> np.ndarray:
        """The index of samples first..end-1, (end - first,) INDEX."""
        begin = self.receipt.index_bytes - self.receipt.samples * INDEX.itemsize
        rows = os.pread(self._index, (end - first) * INDEX.itemsize, begin + first * INDEX.itemsize)
        if len(rows) != (end - first) * INDEX.itemsize:
            raise UserError(f"{self.path.with_suffix('.npy')} was cut short while it was read; {AGAIN} to mend it")
        return np.frombuffer(rows, INDEX)

    @cached_property
    def index(self) -> np.ndarray:
        """All of it, (samples,) INDEX: for those who go through a whole shard."""
        return self.index_rows(0, self.receipt.samples)

    @cached_property
    def firsts(self) -> np.ndarray:
        """The index row of each record's first sample, (records,)."""
        return np.flatnonzero(self.index["narration"] <= 0)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each record, in the order of places. Reads no features."""
        return [self.metadata(row)["key"] for row in self.index[self.firsts]]

    def rows(self, place: int) -> np.ndarray:
        """The index rows of one record, one a sample."""
        end = self.firsts[place + 1] if place + 1 < len(self.firsts) else len(self.index)
        return self.index[self.firsts[place] : end]

    def record(self, row: np.void, jpeg: bool = False) -> Record:
        """The record that an index row belongs to. Raises DamagedRecord."""
        return decode(self.content(row), self.content(row, "jpeg_") if jpeg else None)

    def jpegs(self, row: np.void) -> list[bytes | None]:
        """The encoded pictures of a record, None where one is not stored. Reads no features. Raises DamagedRecord."""
        places = [picture["jpeg"] for picture in self.metadata(row)["pictures"]]
        span = self.content(row, "jpeg_")
        return [None if place is None else bytes(span[place[0] : sum(place)]) for place in places]

    def content(self, row: np.void, kind: str = "") -> bytearray:
        """One pread, checked: a record's safetensors bytes (kind "") or its span of jpegs (kind "jpeg_")."""
        content = self._intact(row, kind)
        if content is None:
            raise self._damaged(row)
        return content

    def _intact(self, row: np.void, kind: str) -> bytearray | None:
        """The bytes in the file, None where they are not those that were written."""
        content = bytearray(int(row[f"{kind}size"]))
        got = os.preadv(self._tar, [content], int(row[f"{kind}offset"])) if content else 0
        return content if got == len(content) and zlib.crc32(content) == row[f"{kind}crc"] else None

    def metadata(self, row: np.void) -> dict[str, Any]:
        """What a record says besides its features, which are not read. Raises DamagedRecord where that is nonsense."""
        try:
            metadata = read_header(self._tar, int(row["offset"]))
            sound = key_hash(metadata["key"]) == row["key"]
            sound &= all("caption" in told for told in metadata["narrations"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise self._damaged(row) from error
        if not sound:
            raise self._damaged(row)
        return metadata

    def _damaged(self, row: np.void) -> DamagedRecord:
        return DamagedRecord(self.path, member_key(self._tar, int(row["offset"])))
