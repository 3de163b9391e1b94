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
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from opt.config import UserError
from opt.data.ask import refuse_secrets
from opt.data.encoding import (
    block_padding,
    encode,
    encode_pictures,
    extended,
    first_jpeg_header,
    member_header,
    parse_header,
)
from opt.data.manifest import LENGTHS, Failure, Receipt, Storage, read_manifest, write_receipt
from opt.data.record import Lengths, Record, RecordError, Sample, check
from opt.data.remote import Cache, RemoteFolder, RemoteShard, Span
from opt.data.stored import INDEX, StoredShard, key_hash
from opt.files import open_atomic, sync_folder, write_atomic

WIDTHS = {"regions": "region_width", "speech": "speech_width"}
"""Which width of a shard an array gives."""
ROWS = 8192
"""Index rows read at once."""
OPEN_SHARDS = 256
"""Shards a reader holds open at once (two files each), below the usual limit of 1024 open files."""


class ShardWriter:
    """Writes one shard; nothing of it appears before the `with` block ends without an error.

        with ShardWriter(folder, shard_name(3)) as shard:
            shard.write(record)
            shard.fail(key, "the picture is broken: ...")

    A shard of that name stays whole until the new one is written, and is replaced then, its receipt first. `int8`
    stores region and speech features as int8 with a scale a row (`encoding.quantise`): half the bytes.
    """

    def __init__(self, folder: Path, name: str, int8: bool = False) -> None:
        self.folder, self.name = folder, name
        self.storage: Storage = "int8" if int8 else "float16"
        self._rows: list[tuple[int, ...]] = []
        self._keys: set[str] = set()
        self._failures: list[Failure] = []
        self._hash = hashlib.sha256()
        self._offset = 0
        self._widths: dict[str, float] = {"region_width": 0, "speech_width": 0, "frame_rate": 0.0}

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._tar = self._stack.enter_context(open_atomic(self.folder / f"{self.name}.tar"))
        return self

    def write(self, record: Record) -> None:
        """Append a record. Raises RecordError, having written nothing of it, when it breaks the contract."""
        check(record)
        self._add(encode(record, self.storage == "int8"), encode_pictures(record), _lengths(record))

    def copy(self, shard: StoredShard, place: int, more: Mapping[str, np.ndarray] | None = None) -> None:
        """Append record `place` of another shard as its stored bytes, checked by their crc and never decoded.

        more: arrays that it gets besides, by the names they are stored under; the contract is the caller's to keep.
        Raises DamagedRecord; RecordError as `write` does; ValueError when that shard stores features in another way.
        """
        if shard.receipt.storage != self.storage:
            raise ValueError(f"{shard.path} stores features as {shard.receipt.storage}, this shard as {self.storage}")
        rows = shard.rows(place)
        lengths = [tuple(int(row[name]) for name in (*LENGTHS, "narration")) for row in rows]
        content = shard.content(rows[0])
        self._add(extended(content, more) if more else content, shard.content(rows[0], "jpeg_"), lengths)

    def fail(self, key: str, reason: str) -> None:
        """Note that a source row, or a part of it, could not be used, and why. It goes into the receipt."""
        self._failures.append(Failure(key, reason))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # two empty blocks end a tar, filled up to its usual record of 20 blocks
            self._append(bytes(1024 + -(self._offset + 1024) % tarfile.RECORDSIZE))
            (self.folder / f"{self.name}.json").unlink(missing_ok=True)
            sync_folder(self.folder)
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self._finish()

    def _add(self, content: bytes | bytearray, jpegs: bytes | bytearray, lengths: list[tuple[int, ...]]) -> None:
        """A record as its safetensors bytes and its span of jpegs; `lengths` end its index rows."""
        metadata, tensors = parse_header(content)
        key = metadata["key"]
        if key in self._keys:
            raise RecordError(f"record {key!r}: this key is in the shard already")
        widths = _widths(metadata, tensors, self._widths)
        header, jpeg_header = member_header(f"{key}.safetensors", len(content)), first_jpeg_header(metadata)
        padding = block_padding(len(content))
        offset = self._offset + len(header)
        jpeg_offset = offset + len(content) + len(padding) + len(jpeg_header) if jpegs else 0
        checksums = (zlib.crc32(content), zlib.crc32(jpegs))
        place = (offset, jpeg_offset, key_hash(key), len(content), len(jpegs), *checksums)
        rows = [(*place, *row) for row in lengths]
        for row in rows:
            for value, name in zip(row, INDEX.names or (), strict=True):
                if value > np.iinfo(INDEX[name]).max:
                    raise RecordError(f"record {key!r}: {name} = {value} exceeds {np.iinfo(INDEX[name]).max}")
        self._append(header, content, padding, jpeg_header, jpegs, block_padding(len(jpegs)))
        self._rows += rows
        self._keys.add(key)
        self._widths = widths

    def _append(self, *pieces: bytes | bytearray) -> None:
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
            storage=self.storage,
            failures=tuple(self._failures),
            **self._widths,  # type: ignore[arg-type]
        )
        write_receipt(self.folder, self.receipt)


class ShardReader:
    """Samples of a complete folder by number. Picklable; safe to use on both sides of a fork; memory stays flat.

    folder: a local folder, or an fsspec URL such as "s3://bucket/shards", which is read through `cache`. `place` is
    what messages call it; `folder` of a remote one is where its files are kept. Raises UserError where none is.
    """

    def __init__(self, folder: Path | str, cache: Cache | None = None) -> None:
        self._remote: RemoteFolder | None = None
        if isinstance(folder, str) and "://" in folder:
            refuse_secrets(folder)
            if cache is None:
                raise UserError(f"{folder} is read through a local cache: ShardReader(url, Cache(folder, gigabytes))")
            self._remote = RemoteFolder(folder, cache)
            self.folder, self.manifest = self._remote.folder, self._remote.manifest
        else:
            self.folder = Path(folder)
            self.manifest = read_manifest(self.folder)
        self.place = str(folder)
        self._starts = np.cumsum([0] + [shard.samples for shard in self.manifest.shards])
        self._open: OrderedDict[int, StoredShard] = OrderedDict()
        self._checked: set[int] = set()
        """Shards whose index has been compared with its hash: once a reader, 50 bytes a sample."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each corpus, in order: here there is one."""
        return (len(self),)

    @property
    def fingerprint(self) -> str:
        """Names this data in results: SHA-256 over all shards' hashes."""
        return self.manifest.fingerprint

    @property
    def lengths(self) -> Lengths:
        """Stored sizes of every sample, int32 (n,) each. Read from the index files at each call."""
        columns = {name: self.column(name).astype(np.int32) for name in LENGTHS}
        return Lengths(**columns, jpegs=self.column("jpeg_size").astype(np.int32))

    @property
    def key_hash(self) -> np.ndarray:
        """`key_hash(key)` of every sample, uint64 (n,). Read from the index files at each call."""
        return self.column("key")

    def column(self, name: str) -> np.ndarray:
        """One column of INDEX over all samples, (n,). Read from the index files at each call."""
        if self._remote is not None:
            self._remote.keep_indices(self.manifest.shards)
        column = np.empty(len(self), INDEX[name])
        end = 0
        for _, rows in self._tables():
            column[end : end + len(rows)] = rows[name]
            end += len(rows)
        return column

    def sample(self, number: int, jpeg: bool = False) -> Sample:
        """Sample `number`, in 0..len-1; jpegs only on request. Raises UserError when its bytes are damaged."""
        row, record = self._read(number, jpeg)
        chosen = int(row["narration"])
        if chosen < 0:
            return Sample(record.key, record.pictures)
        told = record.narrations[chosen]
        return Sample(record.key, record.pictures, chosen, told.narration_id, told.caption, told.speech, told.codes)

    def record(self, number: int, jpeg: bool = False) -> Record:
        """The whole record that sample `number` belongs to. Raises UserError when its bytes are damaged."""
        return self._read(number, jpeg)[1]

    def prefetch(self, numbers: Sequence[int], jpeg: bool = False) -> None:
        """Fetch what the cache lacks of these samples, all at once, before they are read. Local ones are here."""
        if self._remote is not None:
            self._fetch([self.locate(number) for number in numbers], "", *(["jpeg_"] if jpeg else []))

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
        metadata: dict[str, Any] = {}
        for shard, rows in self._tables():
            firsts = rows[rows["narration"] <= 0]
            self._fetch([(shard, row) for row in firsts], "header")
            for row in rows:
                if row["narration"] <= 0:  # the first sample of its record
                    metadata = shard.metadata(row)
                yield row, metadata

    def _tables(self) -> Iterator[tuple[StoredShard, np.ndarray]]:
        """The whole index in order, as pieces (n,) INDEX of a shard each."""
        for number, receipt in enumerate(self.manifest.shards):
            for first in range(0, receipt.samples, ROWS):
                shard = self._shard(number)
                yield shard, shard.index_rows(first, min(first + ROWS, receipt.samples))

    def _fetch(self, places: Sequence[tuple[StoredShard, np.void]], *parts: str) -> None:
        """Parts (see RemoteShard.span) of remote records into the cache, those that are not there."""
        spans: list[Span] = []
        for shard, row in places:
            if isinstance(shard, RemoteShard):
                spans += shard.missing(row, parts)
        if self._remote is not None:
            self._remote.keep(spans)

    def locate(self, number: int) -> tuple[StoredShard, np.void]:
        """The shard of sample `number`, open, and the sample's row of its index."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard, first = self._shard(place), number - int(self._starts[place])
        return shard, shard.index_rows(first, first + 1)[0]

    def _read(self, number: int, jpeg: bool) -> tuple[np.void, Record]:
        shard, row = self.locate(number)
        return row, shard.record(row, jpeg)

    def _shard(self, number: int) -> StoredShard:
        """A shard, open; for a new one, the shard used longest ago is given up."""
        if number not in self._open:
            receipt, trusted = self.manifest.shards[number], number in self._checked
            self._open[number] = (
                StoredShard(self.folder, receipt, trusted) if self._remote is None
                else RemoteShard(self._remote, receipt, trusted)
            )
            self._checked.add(number)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _lengths(record: Record) -> list[tuple[int, ...]]:
    """Words, regions, frames, codes and number of each narration: the end of its index row."""
    regions = sum(len(picture.regions) for picture in record.pictures if picture.regions is not None)
    codes = sum(picture.codes.size for picture in record.pictures if picture.codes is not None)
    rows: list[tuple[int, ...]] = []
    for number, narration in enumerate(record.narrations):
        words = len(re.findall(r"\w+|[^\w\s]", narration.caption or ""))
        frames = 0 if narration.speech is None else len(narration.speech)
        rows.append((words, regions, frames, codes, number))
    return rows or [(0, regions, 0, codes, -1)]


def _widths(
    metadata: dict[str, Any], tensors: dict[str, dict[str, Any]], before: dict[str, float]
) -> dict[str, float]:
    """Feature widths after this record, RecordError where one differs from those before it; the highest frame rate."""
    after = dict(before)
    for name, tensor in tensors.items():
        part, number, field = name.split(".", 2)
        if field in WIDTHS:
            width, value = WIDTHS[field], tensor["shape"][1]
            if after[width] not in (0, value):
                raise RecordError(
                    f"record {metadata['key']!r}: {width} is {value}, the records before it have {after[width]}"
                )
            after[width] = value
        if field == "speech":
            after["frame_rate"] = max(after["frame_rate"], metadata["narrations"][int(number)]["frame_rate"])
    return after
