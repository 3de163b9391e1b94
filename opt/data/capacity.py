"""Filled: a preparer whose batches have few sizes, so that compiled blocks are not compiled again for every batch.

    preparer -> Batch -> every view and writing up to the next capacity by filler sequences at the end -> Batch

What is real keeps its place, so every index stays valid. Filler repeats entries that are there, is seen by no real
token and looked at by no target; a decoder's filler has the label -100, which no loss counts. Its gradients are zero.

Between a power of two and the next lie eight capacities: 1024, 1152 ... 1920, 2048, 2304. So about an eighth at most is
filler, and the batches of a token budget come in four or five sizes; small things are filled coarsely.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opt.data.batch import Batch, View, Writing
from opt.data.layout import AttentionLayout, cross_layout, self_layout
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample

NO_TARGET = -100
"""The label that torch's cross entropy leaves out."""
SEQUENCES = 32
"""Sequences come in multiples of so many, as kernels are planned anew for another number."""
LONGEST_FILLER = 64
SHORTEST_BOUND = 128
"""Bounds on the longest sequence are powers of two from here on."""


class Preparer(Protocol):
    """What is wrapped (opt.systems.system.Preparer)."""

    tasks: Tasks
    jpeg: bool

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch: ...

    def cost(self, lengths: Lengths) -> np.ndarray: ...


class Filled:
    """The preparer `preparer`, its batches filled. Picklable.

    micro_batch_tokens: about how many tokens a micro-batch of one process has; a 32nd of it is the smallest capacity.
    """

    def __init__(self, preparer: Preparer, micro_batch_tokens: int) -> None:
        self.preparer, self.tasks, self.jpeg = preparer, preparer.tasks, preparer.jpeg
        self.smallest = 1 << max(micro_batch_tokens // 32, 1).bit_length() - 1

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each sample, without filler."""
        return self.preparer.cost(lengths)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """The preparer's batch, filled."""
        return self.fill(self.preparer(samples, plan))

    def fill(self, batch: Batch) -> Batch:
        """The batch with filler in all views and writings that are not empty."""
        return dataclasses.replace(
            batch, views={name: self._view(view) for name, view in batch.views.items()},
            writings={name: self._writing(writing) for name, writing in batch.writings.items()},
        )

    def _view(self, view: View) -> View:
        if len(view.gather) == 0:
            return view
        lengths = _lengths(view.layout.query_borders)
        (filler,) = self._filler(lengths)
        layout = _bounded(self_layout(np.concatenate([lengths, filler])), view.layout)
        tables = np.concatenate([view.tables, np.resize(view.tables, int(filler.sum()))])
        return View(_repeat(view.gather, filler.sum()), view.first, layout, view.lengths, tables)

    def _writing(self, writing: Writing) -> Writing:
        if len(writing.ids) == 0:
            return writing
        queries, keys = _lengths(writing.layout.query_borders), _lengths(writing.context.key_borders)
        query_filler, key_filler = self._filler(queries, keys)
        queries, keys = np.concatenate([queries, query_filler]), np.concatenate([keys, key_filler])
        context = cross_layout(np.cumsum(queries) - queries, queries, np.cumsum(keys) - keys, keys)
        filler = int(query_filler.sum())
        return Writing(
            ids=_repeat(writing.ids, filler), positions=_append(writing.positions, filler, 0),
            label=_append(writing.label, filler, NO_TARGET), layout=_bounded(self_layout(queries), writing.layout),
            seen=_repeat(writing.seen, key_filler.sum()), context=_bounded(context, writing.context),
        )

    def _filler(self, *lengths: np.ndarray) -> list[np.ndarray]:
        """For each of the lengths (S,), those of the filler sequences behind them: equally many, none empty (kernels
        differ on those), none longer than LONGEST_FILLER."""
        totals = [int(each.sum()) for each in lengths]
        spare = max(-(-self._step(2 * total) // (LONGEST_FILLER - 2)) for total in totals)
        sequences = len(lengths[0])
        count = _up(sequences + spare, SEQUENCES) - sequences
        fillers = [self.capacity(total + count) - total for total in totals]
        return [np.diff(np.arange(count + 1) * filler // count) for filler in fillers]

    def capacity(self, tokens: int) -> int:
        """The smallest capacity that holds so many tokens."""
        return _up(tokens, self._step(tokens))

    def _step(self, tokens: int) -> int:
        return max(self.smallest, 1 << (tokens - 1).bit_length() >> 4)


def _up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is no less."""
    return -(-number // step) * step


def _lengths(borders: Tensor) -> np.ndarray:
    return np.diff(borders.numpy()).astype(np.int64)


def _bounded(filled: AttentionLayout, real: AttentionLayout) -> AttentionLayout:
    """The filled layout with bounds for lengths; the work that counts stays that of the real one."""
    bounds = [max(SHORTEST_BOUND, 1 << (longest - 1).bit_length()) for longest in filled.longest.shape[:2]]
    longest = filled.longest.new_empty(*bounds, 0)
    return dataclasses.replace(filled, longest=longest, pairs=real.pairs, padded=len(filled.inverse))


def _repeat(entries: Tensor, more: int) -> Tensor:
    """The entries, and behind them as many again as asked for."""
    return torch.cat([entries, torch.from_numpy(np.resize(entries.numpy(), int(more)))])


def _append(entries: Tensor, more: int, value: int) -> Tensor:
    return torch.cat([entries, entries.new_full((more,), value)])
