"""Contrastive alignment of modalities in one space: among the samples of a batch (ours for OPT; CLIP's loss, arXiv
2103.00020, section 2.3), or among what a momentum twin said of these and of earlier ones (ALBEF, arXiv 2107.07651).

Shape legend: B samples of this rank, K places for the samples of all ranks, C keys, E width of the shared space.
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


def momentum_contrast(
    first_BE: Tensor, second_BE: Tensor, kept_first_BE: Tensor, kept_second_BE: Tensor,
    keys_first_CE: Tensor, keys_second_CE: Tensor, both_B: Tensor, has_first_C: Tensor, has_second_C: Tensor,
    picture_B: Tensor, picture_C: Tensor, scale: Tensor, alpha: float | Tensor, count: Tensor, weight: float = 1.0,
) -> Term:
    """Each sample finds its partner among the keys of the other modality, both ways, averaged (Eq. 1, 2 and 6).

    first_BE, second_BE: unit vectors of the model; kept_*: of its twin, for the same samples. keys_*: the twin's, first
    of the samples of all ranks, then of the ring. both_B bool: samples with both modalities; others add nothing. has_*
    bool: keys with that modality; others are shut out, and may hold any finite vector. Own samples are among the keys.
    picture_B, picture_C int64: the target is spread evenly over keys of the own picture, as several captions show it
    (the authors' fine-tuning). alpha: the share of the target that is what the twin believes instead. scale (1,):
    1 / temperature; the twin's beliefs teach it nothing.
    """
    own_BC = picture_B[:, None] == picture_C
    with torch.autocast(scale.device.type, enabled=False):
        forward_B = _distilled(first_BE, kept_first_BE, keys_second_CE, both_B, has_second_C, own_BC, scale, alpha)
        backward_B = _distilled(second_BE, kept_second_BE, keys_first_CE, both_B, has_first_C, own_BC, scale, alpha)
    return Term((forward_B + backward_B).sum() / 2, count, weight)


def _distilled(
    query_BE: Tensor, kept_BE: Tensor, keys_CE: Tensor, asked_B: Tensor, has_C: Tensor, own_BC: Tensor,
    scale: Tensor, alpha: float | Tensor,
) -> Tensor:
    """Cross entropy (B,) of queries among keys against own keys and the twin's beliefs; nothing where not asked, and no
    gradient either."""
    open_BC = has_C & asked_B[:, None]

    def among_keys(vectors_BE: Tensor, scale: Tensor) -> Tensor:
        logits_BC = scale * vectors_BE.float().masked_fill(~asked_B[:, None], 0.0) @ keys_CE.detach().float().T
        return logits_BC.masked_fill(~has_C, float("-inf")).log_softmax(dim=1)

    surprise_BC = -among_keys(query_BE, scale).masked_fill(~open_BC, 0.0)
    believed_BC = among_keys(kept_BE.detach(), scale.detach()).exp()
    own_BC = own_BC & open_BC
    hard_B = surprise_BC.masked_fill(~own_BC, 0.0).sum(dim=1) / own_BC.sum(dim=1).clamp(min=1)
    soft_B = (believed_BC * surprise_BC).sum(dim=1)
    return ((1 - alpha) * hard_B + alpha * soft_B).masked_fill(~asked_B, 0.0)
