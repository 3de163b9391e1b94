"""Several processes, one batch: what must be summed over all of them. In a single process everything is itself.

Losses and gradients are shares: summed over ranks they are those of one process on all rows. What is summed over ranks
inside the forward therefore sends every rank the gradients of all. Each collective runs on every rank, in the order of
the code, also where a rank has nothing to give; none of them waits for the device, but `gather_tokens`.

Shape legend: N entries of this rank's sequences end to end, M of all ranks', B sequences of a rank, W ranks, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalar counts summed over all ranks by name, in one all-reduce; every rank must give the same names.

    With counts summed before the forward, each rank's loss is its share of the global mean: summed over ranks, losses
    and gradients are those of one process on all rows, on uneven and empty masks too.
    """
    if world() == 1 or not counts:
        return counts
    names = sorted(counts)
    summed = torch.stack([counts[name] for name in names])
    dist.all_reduce(summed)
    return dict(zip(names, summed.unbind(), strict=True))


def sum_with_gradient(value: Tensor) -> Tensor:
    """`value` summed over all ranks, of equal shape on each; its gradient is the sum of all ranks' gradients."""
    return value if world() == 1 else _Sum.apply(value)


def gather_rows(rows: Tensor, capacity: int, filler: int = 0) -> Tensor:
    """The rows of all ranks by rank, (world x capacity, ...): own row i stands at rank x capacity + i.

    Each rank's rows are filled up with `filler` to `capacity`, which is equal on all ranks and known without asking
    them. Gradients are exact: own rows get the sum of what all ranks' losses say of them. One process: the rows alone.
    Raises ValueError for more rows than the capacity.
    """
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows exceed the capacity of {capacity}")
    if world() == 1:
        return rows
    filled = _pad(rows, 0, capacity - len(rows), filler)
    return sum_with_gradient(_pad(filled, rank() * capacity, (world() - 1 - rank()) * capacity, 0))


def exchange_tokens(hidden_ND: Tensor, lengths_B: np.ndarray, rows_P: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The sequences `rows_P` of all ranks, end to end (M, D), and their lengths (P,) int64 on the host.

    Row r x B + i is sequence i of rank r; every rank has B sequences, of any length, and asks for as many as it likes.
    Only what is asked for goes from rank to rank. Gradients are exact: entries get the sum of what all who asked for
    them say. Each rank waits for its device, to learn what others have and want. One process: its own, without waiting.
    """
    if world() == 1:
        return _sequences(hidden_ND, lengths_B, rows_P), lengths_B[rows_P]
    counts_W = _of_all(np.array([len(rows_P)]), hidden_ND.device)[:, 0]
    wanted_WP = _of_all(np.pad(rows_P, (0, int(counts_W.max()) - len(rows_P))), hidden_ND.device)
    lengths_WB = _of_all(lengths_B, hidden_ND.device)
    owner_P, size_P = rows_P // len(lengths_B), lengths_WB.reshape(-1)[rows_P]
    order_P = np.argsort(owner_P, kind="stable")
    asked = [wanted[:count][wanted[:count] // len(lengths_B) == rank()] % len(lengths_B)
             for wanted, count in zip(wanted_WP, counts_W, strict=True)]
    sent = _sequences(hidden_ND, lengths_B, np.concatenate(asked))
    given = [int(lengths_B[rows].sum()) for rows in asked]
    taken = [int(size_P[owner_P == owner].sum()) for owner in range(world())]
    arrived = _Exchange.apply(sent, given, taken)
    back_P = np.empty_like(order_P)
    back_P[order_P] = np.arange(len(order_P))
    return _sequences(arrived, size_P[order_P], back_P), size_P


def _sequences(hidden_ND: Tensor, lengths_B: np.ndarray, rows: np.ndarray) -> Tensor:
    """Sequences `rows` end to end; one may come several times."""
    starts, lengths = (np.cumsum(lengths_B) - lengths_B)[rows], lengths_B[rows]
    index = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
    return F.embedding(torch.from_numpy(index).to(hidden_ND.device), hidden_ND)


def _of_all(numbers: np.ndarray, device: torch.device) -> np.ndarray:
    """Numbers (n,) of every rank, n the same on all: (W, n) int64 on the host."""
    own = torch.from_numpy(numbers.astype(np.int64)).to(device)
    return gather_rows(own, len(own)).unflatten(0, (world(), len(own))).numpy(force=True)


def interleaved(rows: Tensor, parts: int) -> Tensor:
    """Rows (parts x B, ...) that were dealt by turns and lie part behind part, back in the order they were dealt from.

    As `plan.split` deals them: a micro-batch's rows gathered from all ranks, in `world` parts, come back as the
    micro-batch; the step's micro-batches one behind the other, in as many parts, come back as the global batch.
    """
    return rows.unflatten(0, (parts, -1)).transpose(0, 1).flatten(0, 1)


def _pad(rows: Tensor, before: int, after: int, value: int) -> Tensor:
    """Rows of `value` before and after."""
    return F.pad(rows, [0, 0] * (rows.ndim - 1) + [before, after], value=value)


class _Sum(torch.autograd.Function):
    """All-reduce, forward and backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class _Exchange(torch.autograd.Function):
    """Rows to and from every rank: `given` and `taken` say how many. Its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int]) -> Tensor:
        ctx.counts = given, taken
        arrived = rows.new_empty(sum(taken), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), taken, given)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        given, taken = ctx.counts
        return _Exchange.apply(gradient, taken, given), None, None
