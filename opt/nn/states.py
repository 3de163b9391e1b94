"""States: one modality of some samples by itself, kept so that pairing it with many others repeats no work.

    samples --System.alone--> States --take(rows)--> States of the pairs --side_by_side--> packed sequences to fuse
                                                                        \\--onto----------> what looks at what

Shape legend: N entries of all samples, S samples, P sequences, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import View, moved
from opt.data.layout import AttentionLayout, cross_layout, ranges, self_layout
from opt.distributed import exchange_tokens

ABSENT = -1
"""The row of a sample that has nothing there: an empty sequence."""


@dataclass(frozen=True)
class States:
    """hidden (N, D): entries of all samples, end to end; lengths (S,) int64 on the host: how many each sample has."""

    hidden: Tensor
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def of(hidden_ND: Tensor, view: View) -> States:
        """The sequences of a view, filler left out."""
        return States(hidden_ND[: int(view.lengths.sum())], view.lengths)

    def take(self, rows: np.ndarray) -> States:
        """The samples `rows` (P,) in that order; one may come several times, ABSENT is an empty sequence."""
        lengths = np.where(rows == ABSENT, 0, self.lengths[rows]) if len(self) else np.zeros(len(rows), np.int64)
        starts = self.starts[rows] if len(self) else lengths
        index = torch.from_numpy(ranges(starts, lengths)).to(self.hidden.device)
        return States(nn.functional.embedding(index, self.hidden), lengths)

    def shortened(self, behind: int) -> States:
        """Each sample without its last `behind` entries."""
        lengths = self.lengths - behind
        index = torch.from_numpy(ranges(self.starts, lengths)).to(self.hidden.device)
        return States(nn.functional.embedding(index, self.hidden), lengths)

    @staticmethod
    def joined(pieces: Sequence[States]) -> States:
        """All samples of the pieces, in order."""
        hidden_ND = torch.cat([piece.hidden for piece in pieces])
        return States(hidden_ND, np.concatenate([piece.lengths for piece in pieces]))

    def of_ranks(self, rows: np.ndarray) -> States:
        """The samples `rows` (P,) of all ranks, which have equally many, counted rank by rank; with exact gradients.
        Only these go from rank to rank."""
        return States(*exchange_tokens(self.hidden, self.lengths, rows))

    @property
    def starts(self) -> np.ndarray:
        """Where each sample begins, int64 (S,)."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def first(self) -> Tensor:
        """The first entry of each sample (S, D). None may be empty."""
        return nn.functional.embedding(torch.from_numpy(self.starts).to(self.hidden.device), self.hidden)

    @property
    def last(self) -> Tensor:
        """The last entry of each sample (S, D). None may be empty."""
        ends = torch.from_numpy(np.cumsum(self.lengths) - 1)
        return nn.functional.embedding(ends.to(self.hidden.device), self.hidden)

    @property
    def layout(self) -> AttentionLayout:
        """Every sample attends to itself."""
        return moved(self_layout(self.lengths), self.hidden.device)

    def padded(self) -> tuple[Tensor, Tensor]:
        """As (S, L, D), and which of them are real (S, L)."""
        pieces = self.hidden.split(self.lengths.tolist())
        padded_SLD = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        valid_SL = np.arange(padded_SLD.shape[1])[None, :] < self.lengths[:, None]
        return padded_SLD, torch.from_numpy(valid_SL).to(self.hidden.device)


def onto(queries: np.ndarray, keys: np.ndarray, device: torch.device, rows: np.ndarray | None = None
         ) -> AttentionLayout:
    """Sequence p of lengths `queries` looks at sequence rows[p] of lengths `keys`, or p; several may share one."""
    starts = np.cumsum(keys) - keys
    if rows is not None:
        starts, keys = starts[rows], keys[rows]
    return moved(cross_layout(np.cumsum(queries) - queries, queries, starts, keys), device)


def side_by_side(parts: Sequence[States], tables: Sequence[int] | None = None) -> tuple[Tensor, View]:
    """Sequence p is what sample p is in each of the parts, in order: entries (N, D), and where sequences begin.

    tables: of the parts (opt.data.pack), where experts ask for them; else TEXT.
    """
    entries_ND, lengths_PM = _side_by_side(parts)
    lengths, table_PM = lengths_PM.sum(1), np.broadcast_to(np.array(tables or 0, np.int8), lengths_PM.shape)
    view = View(
        torch.arange(len(entries_ND)), torch.from_numpy(np.cumsum(lengths) - lengths), self_layout(lengths), lengths,
        np.repeat(table_PM.ravel(), lengths_PM.ravel()),
    )  # fmt: skip
    return entries_ND, moved(view, entries_ND.device)


def beside(parts: Sequence[States]) -> States:
    """Sample p is what it is in each of the parts, one part behind the other."""
    hidden_ND, lengths_PM = _side_by_side(parts)
    return States(hidden_ND, lengths_PM.sum(1))


def _side_by_side(parts: Sequence[States]) -> tuple[Tensor, np.ndarray]:
    """Entries (N, D), and how many each of P samples has of each of M parts, (P, M)."""
    lengths_PM = np.stack([part.lengths for part in parts], axis=1)
    starts_PM, offset = np.empty_like(lengths_PM), 0
    for column, part in enumerate(parts):
        starts_PM[:, column] = offset + part.starts
        offset += len(part.hidden)
    gather = torch.from_numpy(ranges(starts_PM.ravel(), lengths_PM.ravel()))
    hidden_ND = torch.cat([part.hidden for part in parts])
    return nn.functional.embedding(gather.to(hidden_ND.device), hidden_ND), lengths_PM
