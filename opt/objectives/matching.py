"""Matching: do text, picture and speech belong together, and if not, who does (OPT Eq. 11); and which answer belongs to
a question about a picture."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opt.objectives.term import Term

ALL_MATCH, IMAGE_AUDIO, TEXT_AUDIO, TEXT_IMAGE, NONE_MATCH = range(5)
"""The five classes: everything matches; only the named pair matches; nothing does."""


def five_way(
    logits_S5: Tensor, label_S: Tensor, count: Tensor, form: Literal["sigmoid", "softmax"] = "sigmoid"
) -> Term:
    """Which of the five it is.

    sigmoid: binary cross-entropy of five sigmoids against a one-hot label, summed over the five (Eq. 11).
    softmax: cross-entropy of one softmax, as the official code (gap A11).
    """
    if form == "softmax":
        return Term(F.cross_entropy(logits_S5.float(), label_S, reduction="sum"), count)
    target_S5 = F.one_hot(label_S, 5).float()
    return Term(F.binary_cross_entropy_with_logits(logits_S5.float(), target_S5, reduction="sum"), count)


def margin_ranking(true_M: Tensor, false_MK: Tensor, count: Tensor, margin: float = 0.2) -> Term:
    """Each true pair likelier than each of its K false ones by `margin`, as probabilities (UNITER's fine-tuning, A18).

    true_M, false_MK: log-odds that a pair belongs together. count: M x K comparisons.
    """
    true_M1, false_MK = true_M.float().sigmoid()[:, None], false_MK.float().sigmoid()
    return Term(F.relu(margin + false_MK - true_M1).sum(), count)


def draw_negatives(
    scores_BC: Tensor, wrong_BC: Tensor, key_B: Tensor, key_C: Tensor, salt: int = 0
) -> tuple[Tensor, Tensor]:
    """A wrong candidate for each query, the likelier the more right it looks: drawn by the softmax of the scores of a
    contrast among wrong ones only (ALBEF, arXiv 2107.07651, section 3.2), evenly where all scores are 0.

    wrong_BC bool: candidates of another picture than the query's. key_B, key_C int64: random numbers of queries and
    candidates; with `salt` they alone decide what is drawn (Gumbel-max), on any number of ranks and in any order.
    Returns index (B,) int64, and possible (B,) bool: False where no candidate is wrong, and the index says nothing.
    """
    if wrong_BC.shape[1] == 0:
        return torch.zeros_like(key_B), torch.zeros_like(key_B, dtype=torch.bool)
    pair_BC = _mixed(_mixed(_mixed(key_B) + salt)[:, None] + key_C)
    uniform_BC = (_shifted(pair_BC, 12).double() + 0.5) / 2**52  # within 0 and 1, and never either
    noisy_BC = scores_BC.detach().double() - (-uniform_BC.log()).log()
    return noisy_BC.masked_fill(~wrong_BC, float("-inf")).argmax(dim=1), wrong_BC.any(dim=1)


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014) as in opt/data/plan.py, a bijection of int64; sums and
    products wrap around."""
    value = value - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        value = (value ^ _shifted(value, shift)) * factor
    return value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """The upper 64 - `bits` bits of int64 as a number of at least 0."""
    return value >> bits & (1 << 64 - bits) - 1


def soft_classes(logits_MA: Tensor, target_MA: Tensor, count: Tensor) -> Term:
    """Binary cross-entropy of every answer against how right it is, in [0, 1], summed over answers (gap A22)."""
    return Term(F.binary_cross_entropy_with_logits(logits_MA.float(), target_MA, reduction="sum"), count)
