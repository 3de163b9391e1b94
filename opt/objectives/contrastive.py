"""Contrastive alignment of modalities in one space (ours for OPT; CLIP's loss, arXiv 2103.00020, section 2.3).

Shape legend: B samples of this rank, K places for the samples of all ranks, E width of the shared space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opt.distributed import gather_rows, rank
from opt.objectives.term import Term

NO_PICTURE = -1
"""Stands at places that a rank has no sample for."""


def in_batch(
    first_BE: Tensor, second_BE: Tensor, picture_B: Tensor, scale: Tensor, count: Tensor, capacity: int,
    weight: float = 1.0,
) -> Term:
    """Symmetric in-batch contrast: each sample finds its partner among those of all ranks, both ways, averaged.

    first_BE, second_BE: unit vectors float32. picture_B (B,) int64, at least 0: equal for samples of one picture, which
    are no negatives of each other, whatever rank they are on. scale (1,): 1 / temperature. capacity: at least B, equal
    on all ranks. All ranks must take part, also those without samples. Own rows meet the gathered ones, so that the
    total is this rank's share and its gradient is exact.
    """
    both_KE = gather_rows(torch.cat([first_BE, second_BE], dim=1), capacity)
    all_first_KE, all_second_KE = both_KE.chunk(2, dim=1)
    picture_K = gather_rows(picture_B, capacity, filler=NO_PICTURE)
    own_B = rank() * capacity + torch.arange(len(picture_B), device=picture_B.device)
    compared_BK = (picture_B[:, None] != picture_K) & (picture_K != NO_PICTURE)
    shut_BK = ~compared_BK.scatter(1, own_B[:, None], True)
    with torch.autocast(scale.device.type, enabled=False):  # a scale of up to 100 is too much for bfloat16
        forward_BK = (scale * first_BE @ all_second_KE.T).masked_fill(shut_BK, float("-inf"))
        backward_BK = (scale * second_BE @ all_first_KE.T).masked_fill(shut_BK, float("-inf"))
    total = F.cross_entropy(forward_BK, own_B, reduction="sum") + F.cross_entropy(backward_BK, own_B, reduction="sum")
    return Term(total / 2, count, weight)
