"""Search: how a step-by-step decoder's logits become sequences.

    greedy  the likeliest token each time
    draw    by chance, among the likeliest tokens (top-k) or the smallest set of enough mass (nucleus)
    beam    the likeliest whole sequences, several kept under way at once

A `Step` is all a search knows of a decoder; caches live behind it. No search looks at a number on the host but for
the question, every CHECK_EVERY tokens, whether all sequences have ended.

Shape legend: B sequences to write, K hypotheses of each under way, R = B K rows of the decoder, V tokens, L length,
C candidates, E candidates that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, int, Tensor | None], Tensor]
"""step(ids_R, position, parents_R) -> logits (R, V) of what follows `ids_R`, which stand at `position`.

parents_R: the row of the step before that each row now continues; None: each its own.
"""

CHECK_EVERY = 4
"""Tokens between two questions whether all have ended: each makes the host wait for the device."""


class Hypotheses(NamedTuple):
    """The best sequences of each sample, best first.

    ids (B, K, L): tokens; behind an end only ends. scores (B, K) float32: log-probability over length penalty, -inf
    where there are fewer sequences than asked for.
    """

    ids: Tensor
    scores: Tensor


def greedy(step: Step, start_B: Tensor, length: int, end: int | None = None) -> Tensor:
    """Token ids (B, length), the likeliest each time. After `end` a sequence holds only `end`."""
    return _write(step, start_B, length, end, lambda logits_BV, position: logits_BV.argmax(dim=-1))


def draw(
    step: Step, start_B: Tensor, length: int, uniform_BL: Tensor, top_k: int = 0, top_p: float = 1.0,
    temperature: float = 1.0, end: int | None = None,
) -> Tensor:
    """Token ids (B, length), each drawn by its number of `uniform_BL` in [0, 1): what others draw changes nothing.

    Order as in transformers: logits over `temperature`, then the `top_k` likeliest (0: all), then of those the nucleus
    `top_p` (Holtzman et al. 2020): the smallest set of likeliest tokens whose mass reaches it.
    """
    if top_k < 0 or not 0 < top_p <= 1 or temperature <= 0:
        raise ValueError(f"top_k {top_k} must be 0 or more, top_p {top_p} in (0, 1], temperature {temperature} above 0")
    return _write(
        step, start_B, length, end,
        lambda logits_BV, position: pick(logits_BV / temperature, uniform_BL[:, position], top_k, top_p),
    )  # fmt: skip


def beam(
    step: Step, start_B: Tensor, length: int, beams: int, alpha: float = 0.0, end: int | None = None, keep: int = 1
) -> Hypotheses:
    """The `keep` best sequences found with `beams` under way, scored by log-probability / `length_penalty`.

    A sequence ends with `end`, which counts to its length, or at `length` tokens without one. Of the candidates of a
    step those among the best `beams` that end are finished and kept; the best `beams` that do not end go on. The search
    stops when no sequence under way can still beat the `keep` finished ones: log-probabilities only fall, so its
    bound is what it has now, over the largest penalty. What a sample finds does not depend on its batch.
    """
    if not 1 <= keep <= beams or alpha < 0:
        raise ValueError(f"keep {keep} must lie in 1 to beams {beams}, and alpha {alpha} be at least 0")
    batch = len(start_B)
    ids_BKL = start_B.new_full((batch, beams, length), 0 if end is None else end)
    score_BK = torch.full((batch, beams), float("-inf"), device=start_B.device)
    finished = Hypotheses(ids_BKL[:, :keep], score_BK[:, :keep])
    score_BK = score_BK.index_fill(1, start_B.new_zeros(1), 0.0)  # one sequence under way: nothing written yet
    first_row_B1 = torch.arange(batch, device=start_B.device)[:, None] * beams
    last_R, parents_R = start_B.repeat_interleave(beams), None
    for position in range(length):
        logits_BKV = step(last_R, position, parents_R).float().unflatten(0, (batch, beams))
        candidate_BC = (score_BK[:, :, None] + logits_BKV.log_softmax(dim=-1)).flatten(1)
        place_BE = best(candidate_BC, 2 * beams)  # enough for `beams` that go on: each sequence ends in one way only
        parent_BE, token_BE = place_BE // logits_BKV.shape[-1], place_BE % logits_BKV.shape[-1]
        looked_at = Hypotheses(_rows(ids_BKL, parent_BE), candidate_BC.gather(1, place_BE))
        looked_at.ids[:, :, position] = token_BE
        ends_BE = torch.zeros_like(token_BE, dtype=torch.bool) if end is None else token_BE == end
        closed_BE = ends_BE | (position == length - 1)
        final_BE = (looked_at.scores / length_penalty(position + 1, alpha)).masked_fill(~closed_BE, float("-inf"))
        finished = _best_of(finished, Hypotheses(looked_at.ids[:, :beams], final_BE[:, :beams]))
        on_BK = best(looked_at.scores.masked_fill(ends_BE, float("-inf")), beams)
        ids_BKL = _rows(looked_at.ids, on_BK)
        score_BK = looked_at.scores.masked_fill(ends_BE, float("-inf")).gather(1, on_BK)
        last_R = token_BE.gather(1, on_BK).flatten()
        parents_R = (first_row_B1 + parent_BE.gather(1, on_BK)).flatten()
        if end is not None and (position + 1) % CHECK_EVERY == 0:
            bound_B = score_BK[:, 0] / length_penalty(length, alpha)
            if bool((finished.scores[:, -1] >= bound_B).all()):
                break
    return finished


def length_penalty(length: int, alpha: float) -> float:
    """What a log-probability of `length` tokens is divided by (Wu et al. 2016, equation 14)."""
    return ((5 + length) / 6) ** alpha


def pick(logits_BV: Tensor, uniform_B: Tensor, top_k: int, top_p: float) -> Tensor:
    """The token (B,) at which the cumulative probability, likeliest first, passes uniform_B of the kept mass."""
    vocabulary = logits_BV.shape[-1]
    place_BC = best(logits_BV, min(top_k, vocabulary) or vocabulary)
    mass_BC = logits_BV.gather(1, place_BC).softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    before_BC = F.pad(mass_BC[:, :-1], (1, 0))
    last_B1 = (before_BC < top_p).sum(dim=-1, keepdim=True) - 1
    passed_BC = mass_BC <= uniform_B[:, None] * mass_BC.gather(1, last_B1)
    return place_BC.gather(1, passed_BC.sum(dim=-1, keepdim=True).minimum(last_B1)).squeeze(1)


def best(score_BC: Tensor, count: int) -> Tensor:
    """Places (B, count) of the highest float32 scores, best first; of equals the first place, on every device.

    `topk` promises no order among equals. So a score's bits, read as an integer that sorts as the score does, become
    the high part of a key and its place the low part: no two keys are equal.
    """
    candidates = score_BC.shape[-1]
    bits_BC = (score_BC.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: minus zero is zero
    rank_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC).long()
    key_BC = rank_BC * candidates - torch.arange(candidates, device=score_BC.device)
    return key_BC.topk(min(count, candidates), dim=-1).indices


def _write(
    step: Step, start_B: Tensor, length: int, end: int | None, choose: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Token ids (B, length): one sequence a sample, each token by choose(logits_BV, position)."""
    ids_BL = start_B.new_full((len(start_B), length), 0 if end is None else end)
    ids_B, ended_B = start_B, torch.zeros_like(start_B, dtype=torch.bool)
    for position in range(length):
        ids_B = choose(step(ids_B, position, None).float(), position)
        if end is not None:
            ids_B = torch.where(ended_B, end, ids_B)
            ended_B = ended_B | (ids_B == end)
        ids_BL[:, position] = ids_B
        if end is not None and (position + 1) % CHECK_EVERY == 0 and bool(ended_B.all()):
            break
    return ids_BL


def _rows(ids_BCL: Tensor, place_BK: Tensor) -> Tensor:
    """The sequences at these places, each sample its own: a new tensor (B, K, L)."""
    return ids_BCL.gather(1, place_BK[:, :, None].expand(-1, -1, ids_BCL.shape[-1]))


def _best_of(kept: Hypotheses, new: Hypotheses) -> Hypotheses:
    """As many as were kept, of all; of equals the one kept before."""
    score_BC = torch.cat([kept.scores, new.scores], dim=1)
    place_BK = best(score_BC, kept.scores.shape[1])
    return Hypotheses(_rows(torch.cat([kept.ids, new.ids], dim=1), place_BK), score_BC.gather(1, place_BK))
