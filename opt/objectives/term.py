"""Term: what an objective returns, and how terms become a loss.

An objective is a pure function that returns a sum and the number of things summed, never a mean: counts are then summed
over ranks and micro-batches, so a per-token loss comes out exactly as in one process, on uneven and empty masks too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One objective's share of the loss.

    total: scalar float32, the sum over everything that counts, on the graph.
    count: how many things were summed, over all ranks and micro-batches once the trainer has reduced it; scalar.
    weight: factor of this objective in the loss.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """total / count, and 0 (never NaN) when nothing counted."""
        return self.total / self.count.clamp(min=1)


def loss(terms: Mapping[str, Term]) -> Tensor:
    """The weighted sum of the means: scalar float32. Raises ValueError when there is no term."""
    if not terms:
        raise ValueError("a loss needs at least one term")
    return torch.stack([term.weight * term.mean() for term in terms.values()]).sum()
