"""Several folders of shards, read as if they were one: triples, pairs and single modalities in one run.

    open_shards("runs/triples", "runs/captions") --> Corpora: samples end to end, `sizes` says whose they are

A sample's number is its number in its folder, plus the samples of the folders before. What extractors made must agree
wherever two folders have it; a folder may lack pictures, captions or speech altogether. Keys are compared over all
folders: samples of one key show the same picture wherever they lie, so that none is another's negative or partner.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np

from opt.config import UserError
from opt.data.manifest import LENGTHS, Manifest
from opt.data.remote import Cache
from opt.data.shards import ShardReader
from opt.data.stored import INDEX, StoredShard

FACTS = ("extractors", "region_classes", "region_attributes", "codebook", "speech_codebooks")
WIDTHS = ("region_width", "speech_width")
"""What a manifest says of the features; empty or 0 where no record has such features."""


def open_shards(places: Sequence[str], cache: Cache) -> ShardReader:
    """The shards at these places, local folders or fsspec URLs, in this order.

    Raises UserError for shards named twice, a place that holds no complete ones, or folders that do not go together.
    """
    readers = [ShardReader(place, cache) for place in places]
    for first, second in combinations(readers, 2):
        if first.fingerprint == second.fingerprint:
            raise UserError(f"{second.place} names the shards of {first.place} again; name them once, and say by "
                            "--proportions how often to read them")
    return readers[0] if len(readers) == 1 else Corpora(readers)


class Corpora(ShardReader):
    """The samples of several readers end to end. Raises UserError where their features do not go together."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        require_same(readers, whole=False)
        self.readers = tuple(readers)
        self.folder, self.place = readers[0].folder, " and ".join(reader.place for reader in readers)
        self.manifest = _joined([reader.manifest for reader in readers])
        self._starts = np.cumsum([0, *map(len, readers)])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each reader."""
        return tuple(map(len, self.readers))

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, INDEX[name]), *(reader.column(name) for reader in self.readers)])

    def prefetch(self, numbers: Sequence[int], jpeg: bool = False) -> None:
        for start, reader in zip(self._starts.tolist(), self.readers, strict=False):
            reader.prefetch([number - start for number in numbers if 0 <= number - start < len(reader)], jpeg)

    def locate(self, number: int) -> tuple[StoredShard, np.void]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        corpus = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.readers[corpus].locate(number - int(self._starts[corpus]))

    def _headers(self) -> Iterator[tuple[np.void, dict[str, Any]]]:
        return chain.from_iterable(reader._headers() for reader in self.readers)


def require_same(readers: Sequence[ShardReader], whole: bool) -> None:
    """Raises UserError that names the first two folders that were not made alike, and in what.

    whole: they become one folder, so all facts and the storage must be the same; otherwise only those that both have.
    A width of 0, where no record has such features, says nothing in either case.
    """
    for pair in combinations(readers, 2):
        first, second = (_facts(reader.manifest) for reader in pair)
        names = [*FACTS, *(["storage"] if whole else [])]
        names += [name for name in WIDTHS if first[name] and second[name]]
        if not whole:
            names = [name for name in names if first[name] and second[name]]
            kinds = first["extractors"].keys() & second["extractors"].keys()
            for facts in (first, second):
                facts["extractors"] = {kind: about for kind, about in facts["extractors"].items() if kind in kinds}
        if difference := _difference({name: first[name] for name in names}, {name: second[name] for name in names}):
            raise UserError(
                f"{pair[0].place} and {pair[1].place} do not go together: {difference}; only folders made by the "
                f"same extractors {'become one' if whole else 'are read in one run'}"
            )


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What is compared; where weights lay is none of it when a hash says which they are."""
    facts = {name: getattr(manifest, name) for name in (*FACTS, *WIDTHS, "storage")}
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


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest for all: every shard in order, and each fact from the first that has it."""
    facts: dict[str, Any] = {}
    for name in (*FACTS, *WIDTHS):
        values = [getattr(manifest, name) for manifest in manifests]
        facts[name] = next(filter(None, values), values[0])
    facts["extractors"] = dict(ChainMap(*(manifest.extractors for manifest in manifests)))
    return dataclasses.replace(
        manifests[0],
        **facts,
        frame_rate=max(manifest.frame_rate for manifest in manifests),
        shards=tuple(shard for manifest in manifests for shard in manifest.shards),
        records=sum(manifest.records for manifest in manifests),
        samples=sum(manifest.samples for manifest in manifests),
        totals={name: sum(manifest.totals[name] for manifest in manifests) for name in LENGTHS},
        origins=tuple(dict.fromkeys(origin for manifest in manifests for origin in manifest.origins)),
        split=None,
    )
