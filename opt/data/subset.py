"""Some samples of a folder of shards, read as if they were all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opt.data.shards import ShardReader
from opt.data.stored import StoredShard


class Subset(ShardReader):
    """The samples `numbers` (n,) int64 of a reader, ascending; one that stands there twice is two samples."""

    def __init__(self, whole: ShardReader, numbers: np.ndarray) -> None:
        self.folder, self.place, self.manifest = whole.folder, whole.place, whole.manifest
        self.whole, self.numbers = whole, np.sort(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def sizes(self) -> tuple[int, ...]:
        ends = np.searchsorted(self.numbers, np.cumsum(self.whole.sizes))
        return tuple(np.diff(ends, prepend=0).tolist())

    def column(self, name: str) -> np.ndarray:
        return self.whole.column(name)[self.numbers]

    def prefetch(self, numbers: Sequence[int], jpeg: bool = False) -> None:
        self.whole.prefetch(self.numbers[np.asarray(numbers, np.int64)].tolist(), jpeg)

    def locate(self, number: int) -> tuple[StoredShard, np.void]:
        return self.whole.locate(int(self.numbers[number]))

    def _headers(self) -> Iterator[tuple[np.void, dict[str, Any]]]:
        times = np.bincount(self.numbers, minlength=len(self.whole))
        for repeat, (row, header) in zip(times, self.whole._headers(), strict=True):
            for _ in range(repeat):
                yield row, header

    def __reduce__(self) -> tuple[Any, ...]:
        return Subset, (self.whole, self.numbers)
