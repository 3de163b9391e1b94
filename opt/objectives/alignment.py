"""Word-patch alignment: how far the words of a text are from the patches of a picture, where each word goes to the
patches nearest to it and each patch gets its share (ViLT, arXiv 2102.03334; UNITER, arXiv 1909.11740, Eq. 4).

    1 - cosine --IPOT--> plan, without gradient --trace--> a distance each pair --> near where they match, far where not

Shape legend: S pairs, T words, P patches, D width. mask: bool, True = valid; what is not valid changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opt.objectives.term import Term


@torch.no_grad()
def transport_plan(
    cost_STP: Tensor, text_valid_ST: Tensor, patch_valid_SP: Tensor, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """How much of each word goes to each patch, (S, T, P) float32: words give evenly, patches take evenly, 1 in all.

    The cheapest plan in the limit of many iterations: proximal steps of size 1 / beta, one Sinkhorn scaling each (IPOT,
    Xie et al., arXiv 1802.04307, algorithm 1). All zeros where a pair has no valid word or no valid patch.
    """
    words_S1, patches_S1 = (valid.sum(dim=1, keepdim=True).float() for valid in (text_valid_ST, patch_valid_SP))
    valid_STP = text_valid_ST[:, :, None] & patch_valid_SP[:, None, :]
    near_STP = (-cost_STP.float() / beta).exp().masked_fill(~valid_STP, 0.0)
    plan_STP = torch.ones_like(near_STP)
    word_ST = text_valid_ST / words_S1.clamp(min=1)
    for _ in range(iterations):
        plan_STP = near_STP * plan_STP
        patch_SP = _inverse(patches_S1 * (plan_STP * word_ST[:, :, None]).sum(dim=1))
        word_ST = _inverse(words_S1 * (plan_STP * patch_SP[:, None, :]).sum(dim=2))
        plan_STP = word_ST[:, :, None] * plan_STP * patch_SP[:, None, :]
    return plan_STP


def word_patch_distance(
    text_STD: Tensor, patch_SPD: Tensor, text_valid_ST: Tensor, patch_valid_SP: Tensor
) -> Tensor:
    """What the transport costs, (S,) float32: the mean of 1 - cosine under the plan, from 0 to 2; 0 for nothing."""
    with torch.autocast(text_STD.device.type, enabled=False):
        text_STD = F.normalize(text_STD.float().masked_fill(~text_valid_ST[:, :, None], 0.0), dim=-1)
        patch_SPD = F.normalize(patch_SPD.float().masked_fill(~patch_valid_SP[:, :, None], 0.0), dim=-1)
        cost_STP = 1 - text_STD @ patch_SPD.mT
        return (cost_STP * transport_plan(cost_STP.detach(), text_valid_ST, patch_valid_SP)).sum(dim=(1, 2))


def word_patch(distance_S: Tensor, positive_S: Tensor, count: Tensor, weight: float = 0.1) -> Term:
    """Words near the patches of their own picture, far from those of another. positive_S bool; count: all pairs."""
    return Term(torch.where(positive_S, distance_S, -distance_S).sum(), count, weight)


def _inverse(value: Tensor) -> Tensor:
    """1 / value, and 0 for 0."""
    return torch.where(value > 0, 1 / value, 0.0)
