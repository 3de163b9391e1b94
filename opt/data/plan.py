"""The data order: a pure function of (seed, costs, budget, tasks, corpora) and of a position, the samples consumed.

    stream      of a corpus: a permutation of its samples, then another one, without end (each is a turn)
    epoch       as many rows as there are samples, whole groups of `multiple`: from each corpus what its share asks for,
                its stream going on where the epoch before left it; then all of them permuted
    window      consecutive rows of that permutation, sorted by cost, so that the sequences of a batch are alike
    group       `multiple` rows: the grain of a batch, so that every process and micro-batch gets equally many
    batch       consecutive groups up to the budget of tokens; the batches of an epoch come in random order
    row         a sample, its task, its swap partners, its rng key

So the samples of a corpus come equally often, whatever its share, and none is left out. All of it is global: processes
and micro-batches take every so-manieth row of the same batches. Resuming is a number.
Shape legend: n samples, B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from opt.config import UserError

GROUPS_IN_A_WINDOW = 64
TURN, ORDER, BATCH, TASK = range(4)  # what a generator is for, so that no two share a stream
ROW = np.dtype([("sample", np.int32), ("turn", np.int32)])
"""A row of an epoch; turn: how often its sample came before."""
_NOTHING = np.zeros(0, ROW), np.zeros(0, np.int64)


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
    batch, of two other pictures, of the row's own corpus while it has any; -1 where the task needs none or the batch
    holds fewer than three pictures;
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

    costs (n,) int: tokens a sample becomes. budget: most tokens in a global batch; a group that alone costs more is a
    batch of its own. key_hash (n,) uint64: samples of equal hash show the same picture. multiple: rows in a group, a
    multiple of ranks x micro-batches. sizes: samples of each corpus, which stand end to end. proportions: how many of
    the rows come from each corpus, on any scale; None: each sample equally often. Holds 20 bytes a sample.
    Raises UserError when there are fewer samples than one group needs, or for proportions that are none.
    """

    def __init__(
        self,
        seed: int,
        costs: np.ndarray,
        budget: int,
        tasks: Tasks,
        key_hash: np.ndarray,
        multiple: int = 8,
        sizes: Sequence[int] | None = None,
        proportions: Sequence[float] | None = None,
    ) -> None:
        if len(costs) != len(key_hash) or (len(costs) and not 1 <= costs.min() <= costs.max() < 2**31):
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
                "give more data, or fewer processes and micro-batches and a lower --loop.multiple"
            )
        self.seed, self.budget, self.tasks, self.multiple = seed, budget, tasks, multiple
        self.costs = np.asarray(costs, np.int32)
        self.key_hash = np.asarray(key_hash, np.uint64)
        self.sizes = (len(costs),) if sizes is None else tuple(sizes)
        if sum(self.sizes) != len(costs):
            raise ValueError(f"corpora of {self.sizes} samples are not the {len(costs)} samples of the costs")
        self._ends = np.cumsum(self.sizes)
        self.shares = _shares(self.sizes, proportions)
        self.samples_per_epoch = len(costs) // multiple * multiple
        self._epoch, self._cache = -1, _NOTHING

    def batch_at(self, position: int) -> BatchPlan:
        """The batch that begins after `position` samples. Raises UserError where no batch begins there."""
        epoch, offset = divmod(max(position, 0), self.samples_per_epoch)
        order, starts = self._order(epoch)
        number = int(np.searchsorted(starts, offset))
        if position < 0 or starts[number] != offset:
            raise UserError(
                f"no batch begins at position {position}: the run was made with other data, another token budget, "
                "seed, --proportions or grain of batches (--loop.multiple); go on with the settings it began with"
            )
        rng = self._rng(BATCH, epoch, number)
        rows = order[starts[number] : starts[number + 1]]
        sample = rows["sample"].astype(np.int64)
        task = self._one_task(epoch, number, len(sample)) if self.tasks.one_a_step \
            else _deal(self.tasks.shares, len(sample), rng)
        return BatchPlan(
            sample=sample,
            task=task,
            partners=self._partners(sample, task, rng),
            key=row_keys(self.seed, rows["turn"], sample),
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
        """Rows of an epoch in the order of use, ROW, and where its batches begin (one more: the end). Keeps the last.
        """
        if epoch != self._epoch:
            self._epoch, self._cache = -1, _NOTHING  # two epochs at once would take twice the memory
            rng = self._rng(ORDER, epoch)
            rows = self._drawn(epoch)
            rng.shuffle(rows)
            self._sort_windows(rows)
            ends = self._fill(rows)
            batches = np.split(rows, ends[:-1])
            chosen = [batches[number] for number in rng.permutation(len(batches))]
            starts = np.cumsum([0] + [len(batch) for batch in chosen])
            self._epoch, self._cache = epoch, (np.concatenate(chosen), starts)
        return self._cache

    def _drawn(self, epoch: int) -> np.ndarray:
        """What the corpora give for an epoch, one corpus after the other: ROW (samples_per_epoch,)."""
        rows = np.empty(self.samples_per_epoch, ROW)
        before = shared_out(epoch * len(rows), self.shares)
        after = shared_out((epoch + 1) * len(rows), self.shares)
        place = first = 0
        for corpus, (size, start, end) in enumerate(zip(self.sizes, before, after, strict=True)):
            while start < end:
                turn, skipped = divmod(start, size)
                samples = np.arange(first, first + size, dtype=np.int32)
                self._rng(TURN, corpus, turn).shuffle(samples)
                samples = samples[skipped : skipped + end - start]
                part = rows[place : place + len(samples)]
                part["sample"], part["turn"] = samples, turn
                place, start = place + len(samples), start + len(samples)
            first += size
        return rows

    def _sort_windows(self, rows: np.ndarray) -> None:
        """Sort each window by cost, in place."""
        window = GROUPS_IN_A_WINDOW * self.multiple
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            part[:] = part[np.argsort(self.costs[part["sample"]], kind="stable")]

    def _fill(self, rows: np.ndarray) -> list[int]:
        """Consecutive groups into batches, as many as the budget allows, at least one: where each batch ends."""
        costs = self.costs[rows["sample"]].reshape(-1, self.multiple).sum(1, dtype=np.int64).cumsum()
        ends, group, spent = [], 0, 0
        while group < len(costs):
            group = max(group + 1, int(np.searchsorted(costs, spent + self.budget, side="right")))
            ends.append(group * self.multiple)
            spent = int(costs[group - 1])
        return ends

    def _one_task(self, epoch: int, number: int, rows: int) -> np.ndarray:
        """The task of batch `number` of an epoch, for all its rows."""
        drawn = np.flatnonzero(np.array(self.tasks.shares) > 0)
        cycle, place = divmod(number, len(drawn))
        return np.full(rows, self._rng(TASK, epoch, cycle).permutation(drawn)[place])

    def _partners(self, sample: np.ndarray, task: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Two samples of the batch for each row of a partnered task, three different pictures with its own: (B, 2).

        One of another corpus may lack what is to be swapped, or give itself away, and is taken only where there is no
        other.
        """
        partners = np.full((len(sample), 2), -1, np.int64)
        pictures = self.key_hash[sample]
        rows = np.flatnonzero(np.isin(task, [self.tasks.names.index(name) for name in self.tasks.partnered]))
        if len(rows) == 0 or len(np.unique(pictures)) < 3:
            return partners
        corpus = np.searchsorted(self._ends, sample, side="right")
        draw = rng.random((len(rows), len(sample))) + (corpus[rows, None] != corpus[None, :])
        draw[pictures[rows, None] == pictures[None, :]] = np.inf
        for column in range(2):
            chosen = draw.argmin(1)
            partners[rows, column] = sample[chosen]
            draw[pictures[chosen][:, None] == pictures[None, :]] = np.inf
        return partners

    def _rng(self, purpose: int, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, purpose, *numbers))))


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


def shared_out(rows: int, shares: Sequence[Fraction]) -> list[int]:
    """How many of the first `rows` rows of a run come from each corpus; shares of a sum above zero.

    Exact in the long run: never off by more than half a row for each other corpus. More rows never mean fewer for one
    of them, so that each has a stream: it takes its share of what those before it left, rounded, and both what a
    rounding takes and what it leaves grow with the whole.
    """
    counts, left = [], sum(shares)
    for share in shares:
        count = int(rows * share / left + Fraction(1, 2)) if share else 0
        counts.append(count)
        rows, left = rows - count, left - share
    return counts


def _shares(sizes: tuple[int, ...], proportions: Sequence[float] | None) -> tuple[Fraction, ...]:
    """Of how many rows each corpus gives how many. Raises UserError for proportions that are none."""
    if proportions is None:
        return tuple(Fraction(size) for size in sizes)
    said = " ".join(f"{value:g}" for value in proportions)
    if len(proportions) != len(sizes):
        raise UserError(
            f"--proportions {said}: {len(proportions)} for {len(sizes)} folders of shards; give one for each, in their "
            "order, or none to read each sample equally often"
        )
    if not all(0 < value < float("inf") for value in proportions):
        raise UserError(f"--proportions {said}: each must be above 0; leave out the folder that is not to be read")
    if 0 in sizes:
        raise UserError(f"--proportions {said}: folder {sizes.index(0) + 1} holds no samples; leave it out")
    return tuple(Fraction(value) for value in proportions)


def row_keys(seed: int, turn: int | np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The rng key of each row, uint64 (B,): different for different samples, and for each turn of a sample."""
    key = np.zeros(len(sample), np.uint64)
    for part in (np.uint64(seed), np.asarray(turn).astype(np.uint64), sample.astype(np.uint64)):
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
