"""Masked modelling: hidden words, regions and frames are predicted from what is left (OPT Eq. 2-8).

Targets are the original, unmasked inputs under stop-gradient. Every function returns a Term (sum and count).
Shape legend: M targets, V vocabulary or classes, F feature width, T all frames of the batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from opt.data.capacity import NO_TARGET
from opt.objectives.term import Term


def token_cross_entropy(
    logits_MV: Tensor, target_M: Tensor, count: Tensor, smoothing: float = 0.0, weight: float = 1.0,
    soft_MV: Tensor | None = None, alpha: float | Tensor = 0.0,
) -> Term:
    """- log P(target): MLM (Eq. 2), region classes (MRC, Eq. 5), and next tokens (DTR, DIR, Eq. 9-10).

    smoothing: share of the target that is spread evenly over all tokens (gap A12). soft_MV: logits of a momentum twin;
    what it believes is the share `alpha` of the target (ALBEF, arXiv 2107.07651, Eq. 7).
    """
    logits_MV = logits_MV.float()
    total = F.cross_entropy(logits_MV, target_M, reduction="sum", label_smoothing=smoothing, ignore_index=NO_TARGET)
    if soft_MV is not None:
        believed_MV = soft_MV.detach().float().softmax(dim=-1)
        soft_M = F.cross_entropy(logits_MV, believed_MV, reduction="none")
        total = (1 - alpha) * total + alpha * soft_M.masked_fill(target_M == NO_TARGET, 0.0).sum()
    return Term(total, count, weight)


def feature_regression(predicted_MF: Tensor, target_MF: Tensor, count: Tensor, weight: float = 1.0) -> Term:
    """Squared L2 distance over the feature width, averaged over it so that widths compare (MVFR, MAFR, Eq. 4 and 7)."""
    difference_MF = predicted_MF.float() - target_MF.detach().float()
    return Term(difference_MF.square().mean(dim=-1).sum(), count, weight)


def frame_contrast(
    predicted_MF: Tensor, frames_TF: Tensor, own_M: Tensor, sample_M: Tensor, sample_T: Tensor,
    count: Tensor, temperature: float = 0.1, weight: float = 1.0,
) -> Term:
    """Which frame of its own recording was hidden here: cosine NCE (MAC, Eq. 8; temperature is the code's, gap A9).

    own_M: place of each hidden frame in `frames_TF`, the original features of all recordings.
    sample_M, sample_T: which recording a target and a frame belong to; negatives are the other frames of the same one.
    """
    predicted_MF, frames_TF = F.normalize(predicted_MF.float(), dim=-1), F.normalize(frames_TF.detach().float(), dim=-1)
    logits_MT = predicted_MF @ frames_TF.T / temperature
    logits_MT = logits_MT.masked_fill(sample_M[:, None] != sample_T[None, :], float("-inf"))
    if len(own_M) == 0:
        return Term(logits_MT.sum() * 0.0 if logits_MT.numel() else predicted_MF.sum() * 0.0, count, weight)
    return Term(F.cross_entropy(logits_MT, own_M, reduction="sum"), count, weight)
