"""What says that shards are complete: a receipt for each, a manifest for the folder, both written last.

00000.json      receipt of shard 00000: counts, bytes, hashes, failures
manifest.json   all receipts in order, the extractors, the widths of the features
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opt.config import UserError, from_dict, to_dict
from opt.data.record import CODE_GRID
from opt.files import write_atomic

SCHEMA = 2
MANIFEST = "manifest.json"
LENGTHS = ("words", "regions", "frames", "codes")
AGAIN = "run the command that made the folder again"
Storage = Literal["float16", "int8"]
"""How region and speech features lie on disk; what is read is float16."""


@dataclass(frozen=True)
class Failure:
    """A source row, or a part of it, that did not become data, and why: "PART NUMBER: REASON (DETAILS)"."""

    key: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without numbers and details: `recording 3: missing file (x)` as `recording: missing file`."""
        part, _, what = self.reason.partition(": ")
        return f"{part.split(' ')[0]}: {what.partition(' (')[0]}".removesuffix(": ")


@dataclass(frozen=True)
class Receipt:
    """A complete shard. `totals` sums lengths over samples; widths are 0 where the shard holds no such feature."""

    name: str
    records: int
    samples: int
    bytes: int
    index_bytes: int
    sha256: str
    index_sha256: str
    region_width: int
    speech_width: int
    frame_rate: float
    totals: dict[str, int]
    storage: Storage
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Origin:
    """A corpus that records come from, and which split of it, by the names that results call them."""

    name: str
    split: str


UNKNOWN = Origin("unknown", "")
"""Of records whose extraction did not note where they come from."""


@dataclass(frozen=True)
class FrozenPart:
    """Which part of a frozen split the records are, or were before some were left out: see opt/data/split.py."""

    name: str
    part: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete folder. `extractors` says what made it: names, weight hashes, settings.

    `region_classes` and `region_attributes` name the detector's classes and attributes in order, `codebook` counts the
    image codes that exist, `speech_codebooks` the entries of each codebook of the speech quantiser.
    Widths are 0 where no record has such features; `frame_rate` is the highest, since a long recording may be pooled
    more coarsely. `origins` names the corpora that the records come from, `split` the frozen split they are a part of.
    """

    extractors: dict[str, Any]
    region_width: int
    region_classes: tuple[str, ...]
    speech_width: int
    frame_rate: float
    codebook: int
    shards: tuple[Receipt, ...]
    records: int
    samples: int
    totals: dict[str, int]
    storage: Storage = "float16"
    region_attributes: tuple[str, ...] = ()
    speech_codebooks: tuple[int, ...] = ()
    origins: tuple[Origin, ...] = (UNKNOWN,)
    split: FrozenPart | None = None
    schema: int = SCHEMA

    @property
    def codes_grid(self) -> int:
        """Rows and columns of stored image codes: their extractor's setting, unsaid where it is the usual. 0: none."""
        settings = self.extractors.get("codes", {}).get("settings", {})
        return settings.get("codes_grid", CODE_GRID[0]) if self.codebook else 0

    @property
    def failures(self) -> tuple[Failure, ...]:
        """What did not become data, over all shards, in the order of the source."""
        return tuple(failure for shard in self.shards for failure in shard.failures)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of all shards in order: names the data set in results ("split hash")."""
        hashes = "".join(shard.sha256 + shard.index_sha256 for shard in self.shards)
        return hashlib.sha256(hashes.encode()).hexdigest()


def by_reason(failures: Iterable[Failure]) -> Counter[str]:
    """How many failures there are of each kind, e.g. {"picture: missing file": 3}."""
    return Counter(failure.kind for failure in failures)


def shard_name(number: int) -> str:
    """`00003`: names sort as numbers do."""
    return f"{number:05d}"


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Declare a shard complete, after its other files are in place."""
    write_atomic(folder / f"{receipt.name}.json", _json(to_dict(receipt)))


def read_receipt(folder: Path, name: str) -> Receipt | None:
    """The receipt of a complete shard, or None when the shard must be written (again): files missing or damaged."""
    path = folder / f"{name}.json"
    try:
        receipt = from_dict(Receipt, json.loads(path.read_bytes()), str(path))
    except (FileNotFoundError, ValueError, UserError):  # ValueError covers bad JSON and bad UTF-8
        return None
    if receipt.name != name or set(receipt.totals) != set(LENGTHS):
        return None
    sizes = {"tar": receipt.bytes, "npy": receipt.index_bytes}
    files = {kind: folder / f"{name}.{kind}" for kind in sizes}
    return receipt if all(files[k].exists() and files[k].stat().st_size == sizes[k] for k in sizes) else None


def write_manifest(
    folder: Path,
    shards: Sequence[str],
    extractors: dict[str, Any],
    region_classes: Sequence[str],
    codebook: int,
    region_attributes: Sequence[str] = (),
    speech_codebooks: Sequence[int] = (),
    origins: Sequence[Origin] = (UNKNOWN,),
    split: FrozenPart | None = None,
) -> Manifest:
    """Declare the folder complete. `shards` names all its shards in order; extractors as JSON-ready values.

    Raises UserError when one of the shards is incomplete, or when two hold features of different width or storage.
    """
    receipts = []
    for name in shards:
        receipt = read_receipt(folder, name)
        if receipt is None:
            raise UserError(f"{folder}: shard {name} is incomplete; {AGAIN}")
        receipts.append(receipt)
    manifest = Manifest(
        extractors=extractors,
        region_width=_agree(folder, receipts, "region_width") or 0,
        region_classes=tuple(region_classes),
        speech_width=_agree(folder, receipts, "speech_width") or 0,
        frame_rate=max((receipt.frame_rate for receipt in receipts), default=0.0),
        codebook=codebook,
        shards=tuple(receipts),
        records=sum(receipt.records for receipt in receipts),
        samples=sum(receipt.samples for receipt in receipts),
        totals={name: sum(receipt.totals[name] for receipt in receipts) for name in LENGTHS},
        storage=_agree(folder, receipts, "storage") or "float16",
        region_attributes=tuple(region_attributes),
        speech_codebooks=tuple(speech_codebooks),
        origins=tuple(origins),
        split=split,
    )
    write_atomic(folder / MANIFEST, _sealed(to_dict(manifest)))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder. Raises UserError that says what is missing otherwise."""
    path = folder / MANIFEST
    if not folder.is_dir():
        if re.match(r"\w{2,}:/", str(folder)):  # what a path makes of s3://bucket/name
            raise UserError(f"{folder} is the address of a remote folder; only `opt pretrain` reads those, copy it "
                            "to a disk")
        raise UserError(f"{folder} is not a folder; expected shards, as `opt extract` writes them")
    if not path.exists():
        done = len(list(folder.glob("[0-9]*.json")))
        if not done:
            raise UserError(f"{folder} holds no shards; expected a folder as `opt extract` leaves it")
        raise UserError(
            f"{folder} holds {done} complete shards but no {MANIFEST}: `opt extract`, or what else made it, has not "
            f"ended; {AGAIN} to finish it"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest in a file's bytes. Raises UserError naming `path` where they are not those that were written."""
    try:
        values = dict(json.loads(content))
        seal = values.pop("sha256")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); {AGAIN} to write it") from error
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {values.get('schema')}, this version reads {SCHEMA}; extract again, or install the other"
        )
    if content != _sealed(values):
        raise UserError(f"{path} is not as it was written (its SHA-256 was {seal}); {AGAIN} to write it")
    return from_dict(Manifest, values, path)


def is_intact(folder: Path, receipt: Receipt) -> bool:
    """Whether the shard's receipt file holds, byte for byte, what the manifest says of the shard."""
    path = folder / f"{receipt.name}.json"
    return path.exists() and path.read_bytes() == _json(to_dict(receipt))


def _agree(folder: Path, receipts: Sequence[Receipt], name: str) -> Any:
    """The one value that all shards that have one share; None when none has any."""
    values = {getattr(receipt, name): receipt.name for receipt in receipts if getattr(receipt, name)}
    if len(values) > 1:
        raise UserError(
            f"{folder}: shards disagree on {name} ({', '.join(f'{shard}: {v}' for v, shard in values.items())}): they "
            "come from different extractors; extract into an empty folder"
        )
    return next(iter(values), None)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _sealed(values: dict[str, Any]) -> bytes:
    """The values as a file, with a last entry "sha256" over the file without that entry."""
    return _json({**values, "sha256": hashlib.sha256(_json(values)).hexdigest()})
