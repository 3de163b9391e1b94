"""The data order: a pure function of (seed, costs, budget, tasks) and of a position, the number of samples consumed.

    epoch       a permutation of all samples; the remainder that fills no group of `multiple` rows is left out, and
                differs from epoch to epoch as the order does
    window      consecutive samples of that permutation, sorted by cost, so that the sequences of a batch are alike
    group       `multiple` rows: the grain of a batch, so that every rank gets equally many
    batch       consecutive groups up to the budget of tokens; the batches of an epoch come in random order
    row         a sample, its task, its swap partners, its rng key

All of it is global: processes and micro-batches take every so-manieth row of the same batches. Resuming is a number.
Shape legend: n samples, B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from opt.config import UserError

GROUPS_IN_A_WINDOW = 64
ORDER, BATCH, TASK = 0, 1, 2  # what a generator is for, so that no two share a stream


@dataclass(frozen=True)
class Tasks:
    """What rows can be asked to do. `shares` are proportions, on any scale; rows of `partnered` tasks need partners.

    one_a_step: all rows of a batch get the same task; tasks with a share above zero come equally often, in a random
    order that is drawn anew when all have come.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    partnered: tuple[str, ...] = ()
    one_a_step: bool = False

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shares) or len(set(self.names)) != len(self.names):
            raise ValueError(f"tasks {self.names} need distinct names and a share each, got {self.shares}")
        if min(self.shares, default=0) < 0 or sum(self.shares) <= 0:
            raise UserError(f"shares of tasks {self.shares} must not be negative, and not all zero")
        if unknown := set(self.partnered) - set(self.names):
            raise ValueError(f"partnered tasks {sorted(unknown)} are not among {self.names}")


@dataclass(frozen=True)
class BatchPlan:
    """What a batch is made of.

    sample (B,) int64; task (B,) int64 into Tasks.names; partners (B, 2) int64: two other samples of the same global
    batch, of two other pictures, -1 where the task needs none or the batch holds fewer than three pictures;
    key (B,) uint64: rng key of each row. Positions count samples over all epochs and all ranks.
    """

    sample: np.ndarray
    task: np.ndarray
    partners: np.ndarray
    key: np.ndarray
    epoch: int
    position: int
    next_position: int

    def __len__(self) -> int:
        return len(self.sample)


class Plan:
    """Batches by position.

    costs (n,) int64: tokens a sample becomes. budget: most tokens in a global batch; a group that alone costs more is a
    batch of its own. key_hash (n,) uint64: samples of equal hash show the same picture. multiple: rows in a group, a
    multiple of ranks x micro-batches. Raises UserError when there are fewer samples than one group needs.
    """

    def __init__(
        self, seed: int, costs: np.ndarray, budget: int, tasks: Tasks, key_hash: np.ndarray, multiple: int = 8
    ) -> None:
        if len(costs) != len(key_hash) or (len(costs) and costs.min() < 1):
            raise ValueError("every sample needs a cost of at least one token, and a key hash")
        if multiple < 1:
            raise ValueError(f"rows in a group must be at least 1, got {multiple}")
        if seed < 0:
            raise UserError(f"seed {seed}: must be at least 0")
        if budget < 1:
            raise UserError(f"a batch of {budget} tokens: must hold at least 1")
        if len(costs) < multiple:
            raise UserError(
                f"{len(costs)} samples do not fill one group of {multiple} rows, the grain of a batch; "
                "give more data, or fewer processes and micro-batches"
            )
        self.seed, self.budget, self.tasks, self.multiple = seed, budget, tasks, multiple
        self.costs = np.asarray(costs, np.int64)
        self.key_hash = np.asarray(key_hash, np.uint64)
        self.samples_per_epoch = len(costs) // multiple * multiple
        self._epoch = -1

    def batch_at(self, position: int) -> BatchPlan:
        """The batch that begins after `position` samples. Raises UserError where no batch begins there."""
        epoch, offset = divmod(max(position, 0), self.samples_per_epoch)
        order, starts = self._order(epoch)
        number = int(np.searchsorted(starts, offset))
        if position < 0 or starts[number] != offset:
            raise UserError(
                f"no batch begins at position {position}: the run was made with other data, another token budget, "
                "seed, or grain of batches; go on with the settings it began with"
            )
        rng = self._rng(epoch, BATCH, number)
        sample = order[starts[number] : starts[number + 1]]
        task = self._one_task(epoch, number, len(sample)) if self.tasks.one_a_step \
            else _deal(self.tasks.shares, len(sample), rng)
        return BatchPlan(
            sample=sample,
            task=task,
            partners=self._partners(sample, task, rng),
            key=row_keys(self.seed, epoch, sample),
            epoch=epoch,
            position=position,
            next_position=position + len(sample),
        )

    def batches(self, position: int = 0) -> Iterator[BatchPlan]:
        """All batches from `position` on, without end."""
        while True:
            batch = self.batch_at(position)
            yield batch
            position = batch.next_position

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of an epoch in the order of use, and where its batches begin (one more: the end). Keeps the last."""
        if epoch != self._epoch:
            rng = self._rng(epoch, ORDER)
            order = rng.permutation(len(self.costs))[: self.samples_per_epoch]
            window = np.arange(len(order)) // (GROUPS_IN_A_WINDOW * self.multiple)
            order = order[np.lexsort((self.costs[order], window))]
            batches = self._fill(order)
            batches = [batches[number] for number in rng.permutation(len(batches))]
            starts = np.cumsum([0] + [len(batch) for batch in batches])
            self._epoch, self._cache = epoch, (np.concatenate(batches), starts)
        return self._cache

    def _fill(self, order: np.ndarray) -> list[np.ndarray]:
        """Consecutive groups into batches, as many as the budget allows, at least one."""
        ends = np.cumsum(self.costs[order])[self.multiple - 1 :: self.multiple]
        batches, group, spent = [], 0, 0
        while group < len(ends):
            end = max(group + 1, int(np.searchsorted(ends, spent + self.budget, side="right")))
            batches.append(order[group * self.multiple : end * self.multiple])
            group, spent = end, int(ends[end - 1])
        return batches

    def _one_task(self, epoch: int, number: int, rows: int) -> np.ndarray:
        """The task of batch `number` of an epoch, for all its rows."""
        drawn = np.flatnonzero(np.array(self.tasks.shares) > 0)
        cycle, place = divmod(number, len(drawn))
        return np.full(rows, self._rng(epoch, TASK, cycle).permutation(drawn)[place])

    def _partners(self, sample: np.ndarray, task: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Two samples of the batch for each row of a partnered task, three different pictures with its own: (B, 2)."""
        partners = np.full((len(sample), 2), -1, np.int64)
        pictures = self.key_hash[sample]
        rows = np.flatnonzero(np.isin(task, [self.tasks.names.index(name) for name in self.tasks.partnered]))
        if len(rows) == 0 or len(np.unique(pictures)) < 3:
            return partners
        draw = rng.random((len(rows), len(sample)))
        draw[pictures[rows, None] == pictures[None, :]] = 2.0
        for column in range(2):
            chosen = draw.argmin(1)
            partners[rows, column] = sample[chosen]
            draw[pictures[chosen][:, None] == pictures[None, :]] = 2.0
        return partners

    def _rng(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, *purpose))))


def split(batch: BatchPlan, rank: int, world: int, micro: int = 0, micros: int = 1) -> BatchPlan:
    """The rows of process `rank` of `world` in micro-batch `micro` of `micros`.

    A micro-batch is rows micro::micros of the global batch, whatever the number of processes; each process takes every
    world-th of them.
    """
    if len(batch) % (world * micros):
        raise ValueError(
            f"{len(batch)} rows do not split among {world} processes x {micros} micro-batches; Plan's multiple must be "
            "theirs too"
        )
    rows = slice(micro + rank * micros, None, world * micros)
    return replace(
        batch, sample=batch.sample[rows], task=batch.task[rows], partners=batch.partners[rows], key=batch.key[rows]
    )


def row_keys(seed: int, epoch: int, sample: np.ndarray) -> np.ndarray:
    """The rng key of each row, uint64 (B,): different for different samples of an epoch, whatever batch they are in."""
    key = np.zeros(len(sample), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), sample.astype(np.uint64)):
        key = _mix(key + part)
    return key


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014), a bijection of 64-bit numbers; sums wrap around."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _deal(shares: tuple[float, ...], rows: int, rng: np.random.Generator) -> np.ndarray:
    """A task for each row, int64 (rows,): every task within one of its exact number, and exact on average.

    Systematic sampling: one random shift for all borders between tasks, so no task is favoured by rounding.
    """
    borders = np.cumsum(shares) / np.sum(shares) * rows
    borders[-1] = rows
    counts = np.diff(np.floor(borders + rng.random()).astype(np.int64), prepend=0)
    return rng.permutation(np.repeat(np.arange(len(shares)), counts))
