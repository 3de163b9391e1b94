"""Scores that can be quoted: average precision, and bootstrap intervals of any of them.

All numpy, no model and no file. Shape legend: Q queries, C candidates or classes, N samples, S bootstrap resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000


# ---- classification -------------------------------------------------------------------------------------------------


def average_precision(scores_NC: np.ndarray, labels_NC: np.ndarray, weights_SN: np.ndarray | None = None) -> np.ndarray:
    """Step-wise average precision of each class, (C,), or (S, C) with weights; NaN for a class without a positive.

    Equal scores enter together, as in scikit-learn. `weights_SN` says how often each sample counts: one row a resample.
    """
    weights = np.ones((1, len(scores_NC))) if weights_SN is None else np.asarray(weights_SN, np.float64)
    result_SC = np.full((len(weights), scores_NC.shape[1]), np.nan)
    for number in range(scores_NC.shape[1]):
        order = np.argsort(-scores_NC[:, number], kind="stable")
        score, label, weight_SN = scores_NC[order, number], labels_NC[order, number].astype(bool), weights[:, order]
        last = np.searchsorted(-score, -score, side="right") - 1  # where each run of equal scores ends
        hits_SN = np.where(label, weight_SN, 0.0)
        true_S = hits_SN.sum(1)
        precision_SN = np.cumsum(hits_SN, 1)[:, last] / np.maximum(np.cumsum(weight_SN, 1)[:, last], 1e-300)
        some_S = true_S > 0
        result_SC[some_S, number] = (hits_SN * precision_SN).sum(1)[some_S] / true_S[some_S]
    return result_SC[0] if weights_SN is None else result_SC


def mean_average_precision(
    scores_NC: np.ndarray, labels_NC: np.ndarray, weights_SN: np.ndarray | None = None
) -> np.ndarray:
    """Mean of `average_precision` over the classes that have a positive: () or, with weights, (S,)."""
    return np.asarray(np.nanmean(average_precision(scores_NC, labels_NC, weights_SN), axis=-1))


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
