"""Learning from mistakes: which words of a text were changed, and what stood there (ViLEM, CVPR 2023).

    logits of a masked place --draw_edits--> another word --model--> right or wrong? --detection-->  Term
                                                                 \\-> what was it?    --correction--> Term

A word is never changed to itself, so how many wrong words a batch has is known on the host before any of them is drawn.
Shape legend: M places of a masked language model, W words of edited texts, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opt.data.capacity import NO_TARGET
from opt.objectives.masked import token_cross_entropy
from opt.objectives.matching import draw_negatives
from opt.objectives.term import Term


@torch.no_grad()
def draw_edits(logits_MV: Tensor, original_M: Tensor, open_V: Tensor, key_M: Tensor, candidates: int = 20) -> Tensor:
    """Another word for each place (M,) int64: drawn by the softmax over the `candidates` likeliest words that are open
    and are not the original.

    open_V bool: words that may stand in, at least two. key_M int64: random numbers of the places, which alone decide
    what is drawn, whoever else is in the batch.
    """
    open_MV = open_V.expand(len(logits_MV), -1).scatter(1, original_M[:, None], False)
    score_MK, word_MK = logits_MV.float().masked_fill(~open_MV, float("-inf")).topk(min(candidates, len(open_V)))
    drawn_M, _ = draw_negatives(score_MK, score_MK.isfinite(), key_M, word_MK)
    return word_MK.gather(1, drawn_M[:, None]).squeeze(1)


def detection(logits_W2: Tensor, wrong_W: Tensor, count: Tensor, weight: float = 1.0) -> Term:
    """Is each word right, the second class, or wrong, the first? Cross entropy summed over all words.

    wrong_W bool. count: of the wrong ones only, as the authors divide (most words are right); nothing is learned of
    texts where not one word of the whole batch is wrong.
    """
    total = F.cross_entropy(logits_W2.float(), (~wrong_W).long(), reduction="sum")
    return Term(total * (count > 0), count, weight)


def correction(
    logits_MV: Tensor, original_M: Tensor, wrong_M: Tensor, count: Tensor, weight: float = 1.0
) -> Term:
    """- log P(what stood there) where the word is wrong now. wrong_M bool; count: the wrong ones."""
    return token_cross_entropy(logits_MV, original_M.masked_fill(~wrong_M, NO_TARGET), count, weight=weight)


def averaged(first: Term, second: Term) -> Term:
    """The mean of two views of the same things."""
    return Term((first.total + second.total) / 2, first.count, first.weight)
