"""Scores that can be quoted: average precision, and bootstrap intervals of any of them.

All numpy, no model and no file. Shape legend: Q queries, C candidates or classes, N samples, S bootstrap resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
TOGETHER = 4_000_000
"""Weights of resamples in memory at once."""


# ---- classification -------------------------------------------------------------------------------------------------


def average_precision(
    scores_NC: np.ndarray, labels_NC: np.ndarray, weights_SN: np.ndarray | None = None,
    verified_NC: np.ndarray | None = None,
) -> np.ndarray:
    """Step-wise average precision of each class, (C,), or (S, C) with weights; NaN for a class without a positive.

    Equal scores enter together, as in scikit-learn. `weights_SN` says how often each sample counts: one row a resample.
    `verified_NC` bool: samples that count for a class at all; None: all of them for all.
    """
    weights = np.ones((1, len(scores_NC))) if weights_SN is None else np.asarray(weights_SN, np.float64)
    verified = np.ones_like(labels_NC, bool) if verified_NC is None else verified_NC
    result_SC = np.full((len(weights), scores_NC.shape[1]), np.nan)
    for number, kept in enumerate(verified.T):
        result_SC[:, number] = _stepwise(scores_NC[kept, number], labels_NC[kept, number], weights[:, kept])
    return result_SC[0] if weights_SN is None else result_SC


def mean_average_precision(
    scores_NC: np.ndarray, labels_NC: np.ndarray, weights_SN: np.ndarray | None = None,
    verified_NC: np.ndarray | None = None,
) -> np.ndarray:
    """Macro: the mean of `average_precision` over the classes that have a positive: () or, with weights, (S,).

    NaN where none has.
    """
    found = average_precision(scores_NC, labels_NC, weights_SN, verified_NC)
    counted = np.isfinite(found).sum(-1)
    return np.where(counted > 0, np.nansum(found, axis=-1) / np.maximum(counted, 1), np.nan)


def micro_average_precision(
    scores_NC: np.ndarray, labels_NC: np.ndarray, weights_SN: np.ndarray | None = None,
    verified_NC: np.ndarray | None = None,
) -> np.ndarray:
    """Average precision over all verified pairs of a sample and a class in one list: () or, with weights, (S,)."""
    kept = np.ones_like(labels_NC, bool) if verified_NC is None else verified_NC
    scores, labels, sample = scores_NC[kept], labels_NC[kept], np.nonzero(kept)[0]
    if weights_SN is None:
        return _stepwise(scores, labels, np.ones((1, len(scores))))[0]
    together = max(1, TOGETHER // max(1, len(scores)))
    pieces = [_stepwise(scores, labels, weights_SN[first : first + together, sample].astype(np.float64))
              for first in range(0, len(weights_SN), together)]  # fmt: skip
    return np.concatenate(pieces)


def _stepwise(scores: np.ndarray, labels: np.ndarray, weights_SN: np.ndarray) -> np.ndarray:
    """Average precision (S,) of one list of N scores with weights; NaN where no positive has any."""
    order = np.argsort(-scores, kind="stable")
    score, label, weight_SN = scores[order], labels[order].astype(bool), weights_SN[:, order]
    last = np.searchsorted(-score, -score, side="right") - 1  # where each run of equal scores ends
    hits_SN = np.where(label, weight_SN, 0.0)
    true_S = hits_SN.sum(1)
    precision_SN = np.cumsum(hits_SN, 1)[:, last] / np.maximum(np.cumsum(weight_SN, 1)[:, last], 1e-300)
    return np.where(true_S > 0, (hits_SN * precision_SN).sum(1) / np.where(true_S > 0, true_S, 1), np.nan)


# ---- intervals ------------------------------------------------------------------------------------------------------


def resample_counts(groups: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each sample counts in each bootstrap resample, (S, N). `groups` (N,) int: whole groups are drawn."""
    count = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, groups]


def bootstrap(
    values: np.ndarray, seed: int, sizes: np.ndarray | None = None, groups: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % percentile interval of sum(values) / sum(sizes); see `resampled`."""
    return interval(resampled(values, seed, sizes, groups))


def resampled(
    values: np.ndarray, seed: int, sizes: np.ndarray | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """sum(values) / sum(sizes) in every bootstrap resample, (S,); without `sizes` this is the mean.

    Draws of the same groups and seed are the same, so that those of two methods are paired.
    """
    over_S, under_S = resampled_sums(
        np.stack([values, np.ones(len(values)) if sizes is None else sizes], axis=1), seed, groups
    ).T
    return over_S / np.maximum(under_S, 1e-300)


def resampled_sums(values_NK: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Sums over the samples of each bootstrap resample, (S, K) float64.

    `groups` (N,) int names what is drawn together: narrations of one picture are not independent.
    """
    groups = np.arange(len(values_NK)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums_GK = np.stack([np.bincount(groups, weights=column) for column in values_NK.T], axis=1)
    random, count = np.random.default_rng(seed), len(sums_GK)
    sums_SK, done = np.empty((RESAMPLES, values_NK.shape[1])), 0
    while done < RESAMPLES:  # in pieces, so that 25,000 queries need no more memory than 200
        piece = min(RESAMPLES - done, max(1, 4_000_000 // count))
        drawn = random.multinomial(count, np.full(count, 1 / count), size=piece).astype(np.float64)
        sums_SK[done : done + piece] = drawn @ sums_GK
        done += piece
    return sums_SK


def interval(draws: np.ndarray, value: float | None = None) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws (S,), moved so that their mean is `value` where it is given.

    Average precision rises when samples repeat, so its draws lie above the value; means and ratios need no such move.
    """
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, [2.5, 97.5]) - (0.0 if value is None else draws.mean() - value)
    return float(low), float(high)
