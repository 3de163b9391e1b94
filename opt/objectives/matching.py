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


def draw_hard(scores_BC: Tensor, wrong_BC: Tensor) -> Tensor:
    """A wrong candidate (B,) int64 for each query, the likelier the more right it looks: drawn by the softmax of the
    scores, which are those of a contrast (ALBEF, arXiv 2107.07651, section 3.2). Every row needs a wrong candidate."""
    chances_BC = scores_BC.detach().float().masked_fill(~wrong_BC, float("-inf")).softmax(dim=1)
    return torch.multinomial(chances_BC, 1).squeeze(1)


def pairs_match(true_P: Tensor, false_N: Tensor, count: Tensor) -> Term:
    """Binary cross-entropy of the log-odds of true and of false pairs (ALBEF, Eq. 4)."""
    logits, target = torch.cat([true_P, false_N]).float(), torch.zeros(len(true_P) + len(false_N), device=true_P.device)
    target[: len(true_P)] = 1.0
    return Term(F.binary_cross_entropy_with_logits(logits, target, reduction="sum"), count)


def soft_classes(logits_MA: Tensor, target_MA: Tensor, count: Tensor) -> Term:
    """Binary cross-entropy of every answer against how right it is, in [0, 1], summed over answers (gap A22)."""
    return Term(F.binary_cross_entropy_with_logits(logits_MA.float(), target_MA, reduction="sum"), count)
