"""Ranking: which of many candidate texts the decoder would write with the highest probability (ALBEF's answers).

    context (B, M, D) --one step--> first tokens --shortlist--> candidates (B, K) --all steps--> likelihoods (B, K)

A text's log-probability is the sum of those of its tokens and its end: a probability over all texts, in which longer
ones pay for each token. Dividing by the length would favour long candidates that begin unlikely. The context is encoded
and turned to keys and values once, whatever the number of candidates.
Shape legend: B samples, M context tokens, K candidates, L tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opt.nn.writing import Writer

LOGITS = 1 << 24
"""Numbers of one step's logits: candidates are scored so many at once that they fit."""


def rank(
    writer: Writer, context_BMD: Tensor, valid_BM: Tensor, start: int,
    candidates: Sequence[np.ndarray], shortlist: int = 0,
) -> Tensor:
    """Place of the likeliest candidate for each sample, int64 (B,); the first of equals.

    candidates: token ids (l,) each, their end included. shortlist: of so many whose first token is likeliest, equals in
    the order of the candidates; 0: of all.
    """
    ids_KL = pad_sequence([torch.from_numpy(ids) for ids in candidates], True, -1).to(context_BMD.device)
    samples, count = len(context_BMD), len(ids_KL)
    if not 0 < shortlist < count:
        every = torch.arange(count, device=ids_KL.device).expand(samples, -1)
        return likelihoods(writer, context_BMD, valid_BM, start, ids_KL[every]).argmax(dim=1)
    caches = writer.start(context_BMD, valid_BM, 1)
    first_BV = writer.step(torch.full((samples,), start, device=ids_KL.device), 0, caches)
    likeliest = first_BV[:, ids_KL[:, 0]].sort(dim=1, descending=True, stable=True).indices[:, :shortlist]
    chosen_BK = likeliest.sort(dim=1).values
    best_B = likelihoods(writer, context_BMD, valid_BM, start, ids_KL[chosen_BK]).argmax(dim=1)
    return chosen_BK.gather(1, best_B[:, None])[:, 0]


def likelihoods(
    writer: Writer, context_BMD: Tensor, valid_BM: Tensor, start: int, ids_BKL: Tensor
) -> Tensor:
    """Log-probability (B, K) float32 of each sample's texts, -1 behind their ends."""
    together = max(1, LOGITS // (len(ids_BKL) * writer.vocabulary))
    pieces = [_likelihoods(writer, context_BMD, valid_BM, start, piece)
              for piece in ids_BKL.split(together, dim=1)]
    return torch.cat(pieces, dim=1)


def _likelihoods(
    writer: Writer, context_BMD: Tensor, valid_BM: Tensor, start: int, ids_BKL: Tensor
) -> Tensor:
    samples, count, length = ids_BKL.shape
    caches = writer.start(context_BMD, valid_BM, length, count)
    ids_RL = ids_BKL.flatten(0, 1)
    before_R = torch.full((samples * count,), start, device=ids_RL.device)
    total_R = torch.zeros(samples * count, device=ids_RL.device)
    for position, id_R in enumerate(ids_RL.unbind(1)):
        written_R = id_R.clamp(min=0)
        logits_RV = writer.step(before_R, position, caches).float()
        log_R = logits_RV.gather(1, written_R[:, None])[:, 0] - logits_RV.logsumexp(dim=1)
        total_R += torch.where(id_R >= 0, log_R, 0.0)
        before_R = written_R
    return total_R.view(samples, count)
