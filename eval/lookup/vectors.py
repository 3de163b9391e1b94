"""One modality of an index on disk: unit vectors and what each stands for, in one safetensors file.

    samples (C,) int64        number of each entry's sample in the shards
    starts (C + 1,) int64     where each entry's text begins in `entries`
    vectors (C, E) float32
    entries (bytes) uint8     of each entry the JSON of [key, narration id, caption or null]
    metadata                  what all this was made from: model, split, modality

Written piece by piece and read by memory mapping, so that a million entries take little memory either way. Float32,
because a product with float16 would convert every vector at every search: half the disk, several times the time.
Shape legend: C entries, B entries of a piece, E width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt.config import UserError
from opt.data.record import Sample
from opt.files import open_atomic

HEADER = 1024
"""Bytes kept free for the header, which is known last; spaces fill what it leaves."""
DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}


class Entry(NamedTuple):
    """What a vector stands for: a narration, or a picture with the first narration of its record."""

    sample: int
    key: str
    narration_id: str
    caption: str | None


def write_vectors(
    path: Path, numbers: np.ndarray, width: int, pieces: Iterable[tuple[np.ndarray, Sequence[Sample]]],
    made_from: dict[str, str],
) -> None:
    """Write the file, complete or not at all. numbers (C,): the samples; pieces: their vectors (B, E), in order."""
    count, done = len(numbers), 0
    starts = np.zeros(count + 1, np.int64)
    sizes = {"samples": 8 * count, "starts": 8 * (count + 1), "vectors": 4 * count * width}
    places = dict(zip([*sizes, "entries"], np.cumsum([0, *sizes.values()]).tolist(), strict=True))
    begin = 8 + HEADER
    with open_atomic(path, "w+b") as file:
        for vectors_BE, samples in pieces:
            lines = [json.dumps([one.key, one.narration_id, one.caption], ensure_ascii=False).encode()
                     for one in samples]
            file.seek(begin + places["vectors"] + 4 * done * width)
            file.write(np.ascontiguousarray(vectors_BE, DTYPES["F32"]).tobytes())
            file.seek(begin + places["entries"] + int(starts[done]))
            file.write(b"".join(lines))
            ends = slice(done + 1, done + 1 + len(lines))
            starts[ends] = starts[done] + np.cumsum([len(line) for line in lines])
            done += len(lines)
        if done != count:
            raise ValueError(f"{done} vectors came for {count} samples")
        file.seek(begin)
        file.write(np.ascontiguousarray(numbers, DTYPES["I64"]).tobytes() + starts.astype(DTYPES["I64"]).tobytes())
        shapes = {"samples": ("I64", [count]), "starts": ("I64", [count + 1]), "vectors": ("F32", [count, width]),
                  "entries": ("U8", [int(starts[-1])])}
        ends_at = [*places.values(), places["entries"] + int(starts[-1])]
        header = {"__metadata__": made_from} | {
            name: {"dtype": dtype, "shape": shape, "data_offsets": ends_at[place : place + 2]}
            for place, (name, (dtype, shape)) in enumerate(shapes.items())
        }
        file.seek(0)
        file.write(HEADER.to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER))


class Vectors:
    """The file, open. Raises UserError when it is damaged, or was not made from what `made_from` says."""

    def __init__(self, path: Path, made_from: dict[str, str]) -> None:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, HEADER)))
            self.made_from = header["__metadata__"]
            self.samples, self._starts, self.vectors, self._entries = (
                np.memmap(path, DTYPES[about["dtype"]], "r", 8 + size + about["data_offsets"][0], tuple(about["shape"]))
                for about in (header[name] for name in ("samples", "starts", "vectors", "entries"))
            )
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; build the index again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # bad JSON, or a file that ends too early
            raise UserError(f"{path} is damaged; delete it and build the index again") from error
        if self.made_from != made_from:
            raise UserError(f"{path} belongs to another index: it was made from another model or other shards; "
                            "delete it and build the index again")

    def __len__(self) -> int:
        return len(self.samples)

    def entry(self, row: int) -> Entry:
        """What the vector of that row stands for. Raises UserError where the file is damaged."""
        line = self._entries[self._starts[row] : self._starts[row + 1]].tobytes()
        try:
            key, narration_id, caption = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self._entries.filename} is damaged; delete it and build the index again") from error
        return Entry(int(self.samples[row]), key, narration_id, caption)
