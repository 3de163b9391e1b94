"""Ranks of right candidates among all, with ties counted honestly, and what chance would give.

    query and candidate vectors --products, block by block--> rank of each query's best positive, and the first k

A positive shares its query's group (the picture both belong to). Equal scores share their ranks: no sort decides.
Memory stays flat: 5,000 queries among 25,000 candidates never stand in one matrix.
Shape legend: Q queries, C candidates, E width, P positives of a query, k first candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 8_000_000
"""Scores held at once."""
TIE = 1e-5
"""Cosines closer than this are equal: the same caption in another batch differs in its last bits."""


class Ranking(NamedTuple):
    """ranks (Q,) float64 from 1; first (Q, k) int64: places of the best candidates, best first."""

    ranks: np.ndarray
    first: np.ndarray


def ranks(scores_QC: np.ndarray, positive_QC: np.ndarray, tie: float = 0.0) -> np.ndarray:
    """Rank of each query's best positive, float (Q,), from 1; infinite where a query has no positive.

    1 + number of negatives above it + how many of its equals a fair draw puts before it, in expectation: with m equal
    negatives and p equal positives m / (p + 1), so one positive among m equals stands at 1 + m / 2. Scores that differ
    by no more than `tie` from the best positive's are its equals.
    """
    best_Q1 = np.max(np.where(positive_QC, scores_QC, -np.inf), axis=1, keepdims=True)
    above_Q = (~positive_QC & (scores_QC > best_Q1 + tie)).sum(1)
    near_QC = (scores_QC >= best_Q1 - tie) & (scores_QC <= best_Q1 + tie)
    rank_Q = 1.0 + above_Q + (near_QC & ~positive_QC).sum(1) / ((near_QC & positive_QC).sum(1) + 1.0)
    return np.where(positive_QC.any(1), rank_Q, np.inf)


def rank(
    query_QE: np.ndarray, candidate_CE: np.ndarray, query_group: np.ndarray, candidate_group: np.ndarray,
    k: int, seed: int,
) -> Ranking:  # fmt: skip
    """`ranks` of vectors by inner product, in blocks. Every query has a positive; k is at most C.

    Candidates are shuffled by `seed` first, so that no order is favoured where equals are cut off after the first k.
    """
    shuffled = np.random.default_rng(seed).permutation(len(candidate_CE))
    candidates_EC = torch.from_numpy(candidate_CE[shuffled]).T
    positive_QP = torch.from_numpy(_positives(query_group, candidate_group[shuffled]))
    queries_QE = torch.from_numpy(query_QE)
    size, found, first = max(1, BLOCK // len(candidate_CE)), [], []
    for rows in range(0, len(queries_QE), size):
        scores_bC = queries_QE[rows : rows + size] @ candidates_EC
        found.append(_ranks(scores_bC, positive_QP[rows : rows + size]))
        first.append(scores_bC.topk(k, dim=1).indices)
    return Ranking(torch.cat(found).numpy(), shuffled[torch.cat(first).numpy()])


def _positives(query_group: np.ndarray, candidate_group: np.ndarray) -> np.ndarray:
    """Places of each query's positives, (Q, P) int64, filled up to the most there are by repeating the last."""
    order = np.argsort(candidate_group, kind="stable")
    begin, end = (np.searchsorted(candidate_group[order], query_group, side) for side in ("left", "right"))
    if (begin == end).any():
        raise ValueError("every query needs a candidate of its group")
    steps = np.arange(int((end - begin).max()))
    return order[np.minimum(begin[:, None] + steps, end[:, None] - 1)]


def _ranks(scores_QC: Tensor, positive_QP: Tensor) -> Tensor:
    """As `ranks`, with positives by place; a repeated place counts once."""
    positive_scores_QP = scores_QC.gather(1, positive_QP)
    best_Q1 = positive_scores_QP.amax(1, keepdim=True)
    fresh_QP = torch.ones_like(positive_QP, dtype=torch.bool)
    fresh_QP[:, 1:] = positive_QP[:, 1:] != positive_QP[:, :-1]
    equal_positives_Q = ((positive_scores_QP >= best_Q1 - TIE) & fresh_QP).sum(1)
    above_Q = (scores_QC > best_Q1 + TIE).sum(1, dtype=torch.int32)  # 32 bits: 12 times as fast as the usual 64
    level_Q = (scores_QC >= best_Q1 - TIE).sum(1, dtype=torch.int32)
    equals_Q = level_Q - above_Q - equal_positives_Q
    return 1.0 + above_Q.double() + equals_Q.double() / (equal_positives_Q + 1.0)


def chance_recall(positives_Q: np.ndarray, candidates: int, k: int) -> float:
    """Mean probability that a random order of `candidates` puts one of a query's positives among the first k."""
    misses_Q = np.ones(len(positives_Q))
    for drawn in range(min(k, candidates)):
        misses_Q *= np.maximum(candidates - positives_Q - drawn, 0) / (candidates - drawn)
    return float(1 - misses_Q.mean())
