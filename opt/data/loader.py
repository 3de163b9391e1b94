"""Loader: plan + shards + a system's preparer -> a step's prepared micro-batches. Position in, position out.

    Plan.batches --split--> rows of this rank's micro-batches --workers: read samples, prepare--> in order, a step's
    together: (micro-batches, next position)

The parent names each micro-batch and a worker makes it from that name alone, so the number of workers changes nothing,
and there is no worker state to save.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opt.config import UserError
from opt.data.plan import BatchPlan, Plan, split
from opt.data.record import Sample
from opt.data.shards import ShardReader


class Prepare(Protocol):
    """A system's preparer, as far as a loader needs it (opt.systems.system.Preparer)."""

    jpeg: bool

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan, /) -> Any: ...


HANGS = 4.0
"""Seconds at one micro-batch after which a worker may be ended; torch's loader waits five before it ends one."""

# Workers are forked where that is sound: they share the parent's modules and index at once, while a spawned worker
# imports torch anew (5 s of a core). They touch neither CUDA nor thread pools, which do not survive a fork.
START = "fork" if sys.platform == "linux" else "spawn"


@dataclass(frozen=True)
class Failed:
    """What a worker sends instead of a batch: the message, and whether it is meant for the user as it stands."""

    message: str
    for_user: bool


class Loader:
    """Iterates (micro-batches of a step, position after the step) without end, from `position` on.

    preparer: called in workers with the distinct samples of the rows and of their partners, by number, and the rows of
    this rank in one micro-batch; what it returns holds CPU tensors only. prefetch: steps that each worker prepares
    ahead. pin_memory: hand out page-locked tensors, for CUDA. `waited`: seconds spent waiting for batches so far.
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
        micro_batches: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        _check_split(plan.multiple, world, micro_batches)
        if workers < 0:
            raise UserError(f"{workers} workers: must be at least 0 (0 prepares batches in the training process)")
        self.plan, self.position = plan, position
        self.rank, self.world, self.micro_batches = rank, world, micro_batches
        self.waited = 0.0
        self._loader = DataLoader(
            _MicroBatches(reader, preparer),
            batch_size=None,
            sampler=_Rows(self),
            num_workers=workers,
            multiprocessing_context=START if workers else None,
            prefetch_factor=prefetch * micro_batches if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[tuple[list[Any], int]]:
        began, step = time.perf_counter(), []
        for structure, content, position in self._loader:
            if isinstance(structure, Failed):
                raise (UserError if structure.for_user else RuntimeError)(structure.message)
            step.append(_Unpacker(structure, content).load())
            if len(step) == self.micro_batches:
                self.waited += time.perf_counter() - began
                yield step, position
                began, step = time.perf_counter(), []


def _check_split(multiple: int, world: int, micro_batches: int) -> None:
    """Raises UserError where processes and micro-batches would get unequally many rows."""
    if micro_batches < 1:
        raise UserError(f"--loop.accumulate {micro_batches}: a step has at least 1 micro-batch")
    if multiple % (world * micro_batches):
        raise UserError(
            f"rows in groups of {multiple} (--loop.multiple) do not split among {world} processes x {micro_batches} "
            f"micro-batches (--loop.accumulate); set --loop.multiple to a multiple of {world * micro_batches}, or go "
            f"on with a number of processes and an --loop.accumulate whose product divides {multiple}"
        )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and job schedulers signal every process; the parent then asks workers for what it still needs.

    SIGTERM is the parent's too, when a worker did not end for seconds: one that hangs in a read ends then.
    """
    work: Any = get_worker_info()

    def terminate(number: int, frame: Any) -> None:
        if work.dataset.since is not None and time.monotonic() - work.dataset.since > HANGS:
            os._exit(1)

    signal.signal(signal.SIGTERM, terminate)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Rows:
    """The micro-batches of one rank as the loader's sampler: what workers are asked for, in order."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[BatchPlan]:
        asked = self.loader
        for batch in asked.plan.batches(asked.position):
            for micro in range(asked.micro_batches):
                yield split(batch, asked.rank, asked.world, micro, asked.micro_batches)


class _MicroBatches(Dataset[Any]):
    """What a worker does: named rows -> their samples -> the prepared batch, packed, and the position after the step.
    """

    def __init__(self, reader: ShardReader, preparer: Prepare) -> None:
        self.reader, self.preparer = reader, preparer
        self.since: float | None = None
        """When the micro-batch at hand was begun."""

    def __getitem__(self, rows: BatchPlan) -> tuple[bytes | Failed, Tensor, int]:
        self.since = time.monotonic()
        try:
            return self._make(rows)
        finally:
            self.since = None

    def _make(self, rows: BatchPlan) -> tuple[bytes | Failed, Tensor, int]:
        try:
            numbers = np.unique(np.concatenate([rows.sample, rows.partners.ravel()]))
            wanted = [int(number) for number in numbers if number >= 0]
            self.reader.prefetch(wanted, self.preparer.jpeg)
            samples = {number: self.reader.sample(number, self.preparer.jpeg) for number in wanted}
            return *_pack(self._prepare(samples, rows)), rows.next_position
        except UserError as error:
            failed = Failed(str(error), for_user=True)
        except Exception:
            failed = Failed(traceback.format_exc(), for_user=False)
        return failed, torch.zeros(0, dtype=torch.uint8), rows.next_position

    def _prepare(self, samples: dict[int, Sample], rows: BatchPlan) -> Any:
        try:
            return self.preparer(samples, rows)
        except UserError:
            raise
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


# A batch holds a hundred tensors or more. Sent one by one, each takes an open file on both sides, and a few batches in
# flight pass the usual limit of 1024. So all of a batch's bytes travel as one tensor, and the batch's structure beside
# it, with places in that tensor where the tensors stood.

ALIGNMENT = 64


def _pack(batch: Any) -> tuple[bytes, Tensor]:
    """The batch's structure, and the bytes of all its tensors end to end, uint8 (n,)."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(batch)
    return file.getvalue(), torch.cat([torch.zeros(0, dtype=torch.uint8), *packer.pieces])


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, whose bytes it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.pieces: list[Tensor] = []
        self.length = 0

    def persistent_id(self, value: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(value, Tensor):
            return None
        # One element may carry any stride and still count as contiguous; a view as bytes wants stride 1.
        content = value.detach().contiguous().as_strided((value.numel(),), (1,)).view(torch.uint8)
        padding = torch.zeros(-len(content) % ALIGNMENT, dtype=torch.uint8)
        place = (self.length, len(content), value.dtype, tuple(value.shape))
        self.pieces += [content, padding]
        self.length += len(content) + len(padding)
        return place


class _Unpacker(pickle.Unpickler):
    """Puts views of the received bytes where tensors stood: one storage, so pinned memory is released as a whole."""

    def __init__(self, structure: bytes, content: Tensor) -> None:
        super().__init__(io.BytesIO(structure))
        self.content = content

    def persistent_load(self, place: tuple[int, int, torch.dtype, tuple[int, ...]]) -> Tensor:
        start, size, dtype, shape = place
        return self.content[start : start + size].view(dtype).view(shape)
