"""Agreement: two modalities of a sample should pick the same pairs among many, and a pair that agrees far less than
most is none (COTS, arXiv 2204.07441).

    first  x keys of the second --softmax--> \\
    second x keys of the first  --softmax-->  > two beliefs over the same pairs: as close as can be
    similarity of a pair's own keys --below that of earlier ones--> no pair to learn from

Shape legend: B samples of this rank, K of all ranks, R rows of the ring, C keys, E width of the shared space.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opt.objectives.term import Term

Sides = Literal["below", "both", "none"]


def agreement(
    first_BE: Tensor, second_BE: Tensor, keys_first_CE: Tensor, keys_second_CE: Tensor, asked_B: Tensor, both_C: Tensor,
    scale: Tensor, count: Tensor, weight: float = 1.0,
) -> Term:
    """How far apart it is which pair the first modality of a sample finds, and which one the second: the mean of both
    Kullback-Leibler divergences, and 0 where they agree.

    first_BE, second_BE: unit vectors. keys_first_CE, keys_second_CE: row n of both is pair n; own ones are among them.
    asked_B bool: samples with both modalities; others add nothing. both_C bool: keys of both; others are shut out, and
    may hold any finite vector. scale (1,): 1 / temperature.
    """

    def log_chance(query_BE: Tensor, keys_CE: Tensor) -> Tensor:
        logits_BC = scale * query_BE.float() @ keys_CE.detach().float().T
        return logits_BC.masked_fill(~both_C, float("-inf")).log_softmax(dim=1)

    with torch.autocast(scale.device.type, enabled=False):
        one_BC, other_BC = log_chance(first_BE, keys_second_CE), log_chance(second_BE, keys_first_CE)
        shut_BC = ~(both_C & asked_B[:, None])
        apart_BC = (one_BC - other_BC).masked_fill(shut_BC, 0.0)
        more_BC = (one_BC.exp() - other_BC.exp()).masked_fill(shut_BC, 0.0)
    return Term((more_BC * apart_BC).sum() / 2, count, weight)


def trusted(
    similarity_K: Tensor, both_K: Tensor, similarity_R: Tensor, both_R: Tensor, deviations: float,
    sides: Sides = "below",
) -> Tensor:
    """Which pairs are to be learned from, bool (K,): not those whose similarity is more than so many standard
    deviations below the mean of earlier pairs, or on either side (adaptive momentum filter). On a normal distribution 2
    leave 97.7 % of the pairs, or 95.4 %. All are trusted where one earlier pair or none is known, and where none would
    be left.

    both_K, both_R bool: pairs with both modalities; others are none.
    """
    known = both_R.sum()
    mean = similarity_R.masked_fill(~both_R, 0.0).sum() / known
    deviation = ((similarity_R - mean).square().masked_fill(~both_R, 0.0).sum() / (known - 1)).sqrt()
    off_K = {"below": mean - similarity_K, "both": (mean - similarity_K).abs(), "none": torch.zeros_like(similarity_K)}
    left_K = both_K & ~(off_K[sides] > deviations * deviation)  # nothing is more than what is no number
    return torch.where(left_K.any(), left_K, both_K)
