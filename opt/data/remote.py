"""Shards at any fsspec URL, read through a bounded cache on a local disk.

    URL/manifest.json   read when a reader is made: data that changed gets another folder of the cache
    URL/00000.npy       fetched whole, compared with its SHA-256
    URL/00000.tar       fetched by spans of bytes into a file with holes, each span at its own offset

The cache keeps no books. A record is there when its bytes have its checksum; those of a hole are zeros and have not, so
they are fetched. Hence any number of processes and jobs read, fill and empty one cache without locks: the tar used
longest ago is cut to nothing while others read it, and what they then miss they fetch again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from opt.config import UserError
from opt.data.ask import answers, file_system
from opt.data.encoding import FIRST_READ, parse_header
from opt.data.manifest import MANIFEST, Receipt, parse_manifest
from opt.data.stored import DamagedRecord, StoredShard
from opt.files import sha256
from opt.progress import in_bytes

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between one attempt to fetch and the next."""
PATIENCE, SLOWEST = 60.0, 1e6
"""Seconds that an attempt may take, and a second more for as many bytes asked for."""
NEAR = 64 * 1024
"""Spans so close are fetched as one: the bytes between them cost less than another request."""
REQUESTS, BLOCK = 256, 64 * 2**20
"""Requests under way at once, and bytes that they bring."""
FULL, EMPTIED = 15 / 16, 7 / 8
"""Shares of a cache's bound: one that holds FULL is brought to EMPTIED."""
SEEN, GROUP = 1 / 512, 1 / 256
"""Shares that a process writes before it looks how full the cache is, and that it fetches at once: what some ten
processes do between two looks stays below what FULL leaves free."""
WHOLE = -1
"""End of a span that is a whole file of unknown size."""


class Span(NamedTuple):
    """Bytes start..end-1 of a file of the folder."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Cache:
    """A folder on a local disk that holds at most `gigabytes` (10^9 bytes) of remote shards, for all that share it.

    Its file system should know holes (ext4, xfs, btrfs, APFS, tmpfs); where it does not, files take their whole length.
    """

    folder: Path
    gigabytes: float

    def __post_init__(self) -> None:
        if not self.gigabytes > 0:
            raise UserError(f"a cache of {self.gigabytes} gigabytes holds nothing: give it more than 0")

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)

    def make_room(self, need: int) -> None:
        """Empty the shards used longest ago when `need` more bytes would pass the bound."""
        shards = sorted(self._shards())
        taken = need + sum(size for _, size, _ in shards)
        if taken <= self.bytes * FULL:
            return
        for _, size, tar in shards:
            if taken <= self.bytes * EMPTIED:
                break
            tar.with_suffix(".npy").unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                os.truncate(tar, 0)  # not deleted: processes that have it open would go on filling it, unseen
            taken -= size

    def _shards(self) -> Iterator[tuple[int, int, Path]]:
        """When each shard was last used (ns), the bytes it takes on the disk, and its tar; empty ones left out."""
        for tar in self.folder.glob("*/*.tar"):
            used = size = 0
            with suppress(FileNotFoundError):
                status = tar.stat()
                used, size = status.st_mtime_ns, 512 * status.st_blocks
                size += 512 * tar.with_suffix(".npy").stat().st_blocks
            if size:
                yield used, size, tar


class RemoteFolder:
    """A complete folder of shards at `url`: its `manifest`, and `folder`, where the cache keeps its files.

    Picklable; connections belong to the process that opens them. Every failure to fetch is tried again after a pause
    (PAUSES) and then a UserError that names the URL; so is a cache that cannot be written.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self.manifest = parse_manifest(self._get([Span(MANIFEST, 0, WHOLE)])[0], f"{self.url}/{MANIFEST}")
        self.folder = cache.folder / self.manifest.fingerprint[:32]
        self._unseen = 0
        """Bytes written since room was last looked for."""
        indices = sum(receipt.index_bytes for receipt in self.manifest.shards)
        if indices > cache.bytes / 2:
            raise UserError(f"{url}: its index alone takes {in_bytes(indices)} of a cache of {cache.gigabytes:g} "
                            "gigabytes; give the cache at least ten times that")
        with self._writing():
            pass  # a cache that cannot be written is said at once

    def keep_indices(self, receipts: Sequence[Receipt]) -> None:
        """Fetch the indices that the cache lacks, many at once. Raises UserError where one is not as it was written."""
        lacking = [receipt for receipt in receipts if not (self.folder / f"{receipt.name}.npy").exists()]
        spans = [Span(f"{receipt.name}.npy", 0, receipt.index_bytes) for receipt in lacking]
        hashes = {f"{receipt.name}.npy": receipt.index_sha256 for receipt in lacking}
        for block in self._blocks(spans):
            for span, content in zip(block, self._get(block), strict=True):
                if hashlib.sha256(content).hexdigest() != hashes[span.name]:
                    raise UserError(f"{self.url}/{span.name} is not the index that the manifest names (its SHA-256 "
                                    "differs): what lies there was replaced or damaged; start again, or mend it")
                self._write_index(span.name, content)

    def touch(self, receipt: Receipt) -> None:
        """Make the cache's file of a shard, or mark it as used."""
        with self._writing():
            (self.folder / f"{receipt.name}.tar").touch()

    def keep(self, spans: Sequence[Span]) -> None:
        """Fetch spans of tars into the cache, many at once."""
        for block in self._blocks(_joined(spans)):
            self._write(block, self._get(block))

    def get(self, span: Span) -> bytes:
        """The bytes of one span, fetched, and put into the cache, too."""
        contents = self._get([span])
        self._write([span], contents)
        return contents[0]

    def _blocks(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """The spans in groups that are fetched at once and held in memory."""
        most = min(BLOCK, self.cache.bytes * GROUP)
        block: list[Span] = []
        for span in spans:
            if len(block) == REQUESTS or block and sum(s.end - s.start for s in block) + span.end - span.start > most:
                yield block
                block = []
            block.append(span)
        if block:
            yield block

    def _get(self, spans: list[Span]) -> list[bytes]:
        """The bytes of the spans. Raises UserError when the last of several attempts failed."""
        found: dict[Span, bytes] = {}
        began = time.monotonic()
        for pause in (*PAUSES, None):
            asked = [span for span in spans if span not in found]
            for span, answer in zip(asked, self._ask(asked), strict=True):
                if isinstance(answer, bytes):
                    found[span] = answer
                else:
                    reason = getattr(answer, "strerror", None) or str(answer) or type(answer).__name__
                    fault = f"{self.url}/{span.name}: {reason}"
            if len(found) == len(spans):
                break
            if pause is None:
                raise UserError(f"{fault} ({len(PAUSES) + 1} attempts in {time.monotonic() - began:.0f} seconds); run "
                                "the same command again once network and server are well")
            time.sleep(pause)
        return [found[span] for span in spans]

    def _ask(self, spans: list[Span]) -> list[bytes | BaseException]:
        """One attempt: the bytes of each span, or what went wrong. Raises UserError for what no attempt will mend."""
        system, root = file_system(self.url)
        wanted = [(f"{root}/{span.name}", *((None, None) if span.end == WHOLE else span[1:])) for span in spans]
        size = sum(span.end - span.start for span in spans)
        came = answers(system, wanted, PATIENCE + max(0, size) / SLOWEST)
        for place, (span, answer) in enumerate(zip(spans, came, strict=True)):
            if isinstance(answer, FileNotFoundError | PermissionError):
                raise UserError(_refused(f"{self.url}/{span.name}", answer)) from answer
            if isinstance(answer, bytes) and span.end != WHOLE and len(answer) != span.end - span.start:
                if len(answer) > span.end - span.start:
                    raise UserError(f"{self.url}/{span.name}: its server sends more than the bytes asked for; it must "
                                    "answer requests for ranges (most do; Python's http.server does not)")
                came[place] = EOFError(f"{len(answer):,} bytes came of {span.end - span.start:,}: it broke off, or "
                                          "what lies there was replaced")
        return came

    def _write(self, spans: Sequence[Span], contents: Sequence[bytes]) -> None:
        """Spans of tars into the cache's files, each at its place."""
        with self._writing(sum(map(len, contents))):
            for span, content in zip(spans, contents, strict=True):
                file = os.open(self.folder / span.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    written = 0
                    while written < len(content):
                        written += os.pwrite(file, content[written:], span.start + written)
                finally:
                    os.close(file)

    def _write_index(self, name: str, content: bytes) -> None:
        """An index into the cache, whole or not at all. Not fsynced: what a power cut spoils, its SHA-256 tells."""
        temporary = self.folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        with self._writing(len(content)):
            try:
                temporary.write_bytes(content)
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, need: int = 0) -> Iterator[None]:
        """Around what writes `need` bytes: room for them, and a sentence where the disk does not take them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # again, where somebody deleted the cache
            self._unseen += need
            if self._unseen > self.cache.bytes * SEEN:
                self.cache.make_room(self._unseen)
                self._unseen = 0
            yield
        except OSError as error:
            raise UserError(f"{self.cache.folder}: the cache of {self.url} cannot be written ({error.strerror}); free "
                            "the disk, give a smaller cache or another folder") from error


class RemoteShard(StoredShard):
    """A shard of a remote folder: a StoredShard of the cache's files, that fetches what they lack."""

    def __init__(self, remote: RemoteFolder, receipt: Receipt, trusted: bool = False) -> None:
        self.remote = remote
        index = remote.folder / f"{receipt.name}.npy"
        if not trusted and index.exists() and sha256(index) != receipt.index_sha256:
            index.unlink(missing_ok=True)
        remote.touch(receipt)
        remote.keep_indices([receipt])
        super().__init__(remote.folder, receipt, trusted=True)

    def missing(self, row: np.void, parts: Sequence[str]) -> list[Span]:
        """Parts of a record (see `span`) with a hole in the cache's file: not there, which is seen without reading."""
        os.utime(self._tar)  # used: the last to be emptied
        return [span for span in (self.span(row, part) for part in parts) if self._is_hole(span)]

    def span(self, row: np.void, part: str) -> Span:
        """Where the safetensors bytes of a record lie (part ""), or its jpegs ("jpeg_"), or its "header".

        The record's begin at its tar header, which names its key for messages.
        """
        kind = "" if part == "header" else part
        start, size = int(row[f"{kind}offset"]), int(row[f"{kind}size"])
        end = start + (min(size, FIRST_READ) if part == "header" else size)
        return Span(f"{self.receipt.name}.tar", start if kind else start - BLOCKSIZE, end)

    def content(self, row: np.void, kind: str = "") -> bytearray:
        """As a local shard's; fetched when the cache does not have it. Raises DamagedRecord."""
        content = self._intact(row, kind)
        if content is None:  # read as it came: another process may empty the file at once
            span = self.span(row, kind)
            content = bytearray(self.remote.get(span)[int(row[f"{kind}offset"]) - span.start :])
            if crc32(content) != row[f"{kind}crc"]:
                raise self._damaged(row)
        return content

    def metadata(self, row: np.void) -> dict[str, Any]:
        """As a local shard's; of the whole record, fetched, when the cache does not have it. Raises DamagedRecord."""
        try:
            return super().metadata(row)
        except DamagedRecord:
            return parse_header(self.content(row))[0]

    def _damaged(self, row: np.void) -> DamagedRecord:
        return DamagedRecord(f"{self.remote.url}/{self.path.name}", super()._damaged(row).key)

    def _is_hole(self, span: Span) -> bool:
        """Whether the file has a hole, or its end, within the span."""
        if span.start == span.end:
            return False
        try:
            return os.lseek(self._tar, span.start, os.SEEK_HOLE) < span.end
        except OSError as error:  # the file ends before the span
            if error.errno != errno.ENXIO:
                raise
            return True


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those near each other made one."""
    joined: list[Span] = []
    for span in sorted(spans):
        last = joined[-1] if joined else None
        if last and last.name == span.name and span.start - last.end <= NEAR:
            joined[-1] = Span(span.name, last.start, max(last.end, span.end))
        else:
            joined.append(span)
    return joined


def _refused(url: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{url}: may not be read ({error}); see docs/shards.md on credentials"
    return f"{url} does not exist; expected a complete folder of shards, as `opt extract` leaves it"
