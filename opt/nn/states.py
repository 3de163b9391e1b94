"""States: one modality of some samples by itself, kept so that pairing it with many others repeats no work.

    samples --System.alone--> States --take(rows)--> States of the pairs --side_by_side--> packed sequences to fuse

Shape legend: N entries of all samples, S samples, P sequences, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import View, moved
from opt.data.layout import ranges, self_layout


@dataclass(frozen=True)
class States:
    """hidden (N, D): entries of all samples, end to end; lengths (S,) int64 on the host: how many each sample has."""

    hidden: Tensor
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> States:
        """The samples `rows` (P,) in that order; one may come several times."""
        starts = np.cumsum(self.lengths) - self.lengths
        index = torch.from_numpy(ranges(starts[rows], self.lengths[rows])).to(self.hidden.device)
        return States(nn.functional.embedding(index, self.hidden), self.lengths[rows])

    @staticmethod
    def joined(pieces: Sequence[States]) -> States:
        """All samples of the pieces, in order."""
        hidden_ND = torch.cat([piece.hidden for piece in pieces])
        return States(hidden_ND, np.concatenate([piece.lengths for piece in pieces]))


def side_by_side(parts: Sequence[States]) -> tuple[Tensor, View]:
    """Sequence p is what sample p is in each of the parts, in order: entries (N, D), and where sequences begin."""
    lengths_PM = np.stack([part.lengths for part in parts], axis=1)
    starts_PM, offset = np.empty_like(lengths_PM), 0
    for column, part in enumerate(parts):
        starts_PM[:, column] = offset + np.cumsum(part.lengths) - part.lengths
        offset += len(part.hidden)
    lengths = lengths_PM.sum(1)
    entries_ND = torch.cat([part.hidden for part in parts])
    view = View(
        torch.from_numpy(ranges(starts_PM.ravel(), lengths_PM.ravel())),
        torch.from_numpy(np.cumsum(lengths) - lengths), self_layout(lengths),
    )  # fmt: skip
    view = moved(view, entries_ND.device)
    return nn.functional.embedding(view.gather, entries_ND), view
