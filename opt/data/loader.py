"""Loader: plan + shards + a system's preparer -> prepared batches. Position in, position out.

    Plan.batches --split--> rows of this rank --workers: read samples, prepare--> (batch, next position), in order

The parent names each batch and a worker makes it from that name alone, so the number of workers changes nothing, and
there is no worker state to save.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from opt.config import UserError
from opt.data.plan import BatchPlan, Plan, split
from opt.data.record import Sample
from opt.data.shards import ShardReader

Prepare = Callable[[dict[int, Sample], BatchPlan], Any]

# Workers are forked where that is sound: they share the parent's modules and index at once, while a spawned worker
# imports torch anew (5 s of a core). They touch neither CUDA nor thread pools, which do not survive a fork.
START = "fork" if sys.platform == "linux" else "spawn"


@dataclass(frozen=True)
class Failed:
    """What a worker sends instead of a batch: the message, and whether it is meant for the user as it stands."""

    message: str
    for_user: bool


class Loader:
    """Iterates (batch, next position) without end, from `position` on.

    preparer: called in workers with the distinct samples of the rows and of their partners, by number, and the rows of
    this rank; what it returns holds CPU tensors only. prefetch: batches that each worker prepares ahead.
    pin_memory: hand out page-locked tensors, for CUDA. `waited`: seconds spent waiting for batches so far.
    Iterating raises UserError for damaged shards, RuntimeError naming the sample where the preparer fails.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: Plan,
        preparer: Prepare,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if plan.multiple % world:
            raise UserError(f"batches in groups of {plan.multiple} rows do not split among {world} processes")
        self.plan, self.position, self.rank, self.world = plan, position, rank, world
        self.waited = 0.0
        self._loader = DataLoader(
            _Batches(reader, preparer),
            batch_size=None,
            sampler=_Rows(self),
            num_workers=workers,
            multiprocessing_context=START if workers else None,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        began = time.perf_counter()
        for batch, position in self._loader:
            self.waited += time.perf_counter() - began
            if isinstance(batch, Failed):
                raise (UserError if batch.for_user else RuntimeError)(batch.message)
            yield batch, position
            began = time.perf_counter()


class _Rows:
    """The batches of one rank as the loader's sampler: what workers are asked for, in order."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[BatchPlan]:
        for batch in self.loader.plan.batches(self.loader.position):
            yield split(batch, self.loader.rank, self.loader.world)


class _Batches(Dataset[Any]):
    """What a worker does: a named batch -> its samples -> the prepared batch and the position after it."""

    def __init__(self, reader: ShardReader, preparer: Prepare) -> None:
        self.reader, self.preparer = reader, preparer

    def __getitem__(self, rows: BatchPlan) -> tuple[Any, int]:
        try:
            numbers = np.unique(np.concatenate([rows.sample, rows.partners.ravel()]))
            samples = {int(number): self.reader.sample(int(number)) for number in numbers[numbers >= 0]}
            return self._prepare(samples, rows), rows.next_position
        except UserError as error:
            return Failed(str(error), for_user=True), rows.next_position
        except Exception:
            return Failed(traceback.format_exc(), for_user=False), rows.next_position

    def _prepare(self, samples: dict[int, Sample], rows: BatchPlan) -> Any:
        try:
            return self.preparer(samples, rows)
        except Exception as error:
            keys = [samples[int(number)].key for number in self._guilty(samples, rows)]
            raise RuntimeError(
                f"the preparer failed at position {rows.position}, epoch {rows.epoch}, on {', '.join(map(repr, keys))}"
            ) from error

    def _guilty(self, samples: dict[int, Sample], rows: BatchPlan) -> np.ndarray:
        """The first row that fails alone, as a sample's number; all rows when each alone is fine."""
        for number in range(len(rows)):
            try:
                self.preparer(samples, split(rows, number, len(rows)))
            except Exception:
                return rows.sample[number : number + 1]
        return rows.sample
