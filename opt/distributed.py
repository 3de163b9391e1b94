"""Several processes, one batch: what must be summed over all of them. In a single process everything is itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalar counts summed over all ranks by name, in one all-reduce; every rank must give the same names.

    With counts summed before the forward, each rank's loss is its share of the global mean: summed over ranks, losses
    and gradients are those of one process on all rows, on uneven and empty masks too.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or not counts:
        return counts
    names = sorted(counts)
    summed = torch.stack([counts[name] for name in names])
    dist.all_reduce(summed)
    return dict(zip(names, summed.unbind(), strict=True))
