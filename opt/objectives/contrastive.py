"""Contrastive alignment of modalities in one space (ours for OPT; CLIP's loss, arXiv 2103.00020, section 2.3).

Shape legend: B samples, E width of the shared space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opt.objectives.term import Term


def in_batch(
    first_BE: Tensor, second_BE: Tensor, picture_B: Tensor, scale: Tensor, count: Tensor, weight: float = 1.0
) -> Term:
    """Symmetric in-batch contrast: each sample finds its partner among all, in both directions, averaged.

    first_BE, second_BE: unit vectors. picture_B (B,) int64: equal for samples of one picture, which are no negatives of
    each other. scale: 1 / temperature.
    """
    if len(first_BE) == 0:
        return Term((first_BE.sum() + second_BE.sum()) * 0.0 * scale, count, weight)
    logits_BB = scale * first_BE.float() @ second_BE.float().T
    same_BB = picture_B[:, None] == picture_B[None, :]
    own_BB = torch.eye(len(picture_B), dtype=torch.bool, device=picture_B.device)
    logits_BB = logits_BB.masked_fill(same_BB & ~own_BB, float("-inf"))
    target_B = torch.arange(len(picture_B), device=picture_B.device)
    forward = F.cross_entropy(logits_BB, target_B, reduction="sum")
    backward = F.cross_entropy(logits_BB.T, target_B, reduction="sum")
    return Term((forward + backward) / 2, count, weight)
