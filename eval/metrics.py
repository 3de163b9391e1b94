"""Scores that can be quoted: word error rate, average precision, and bootstrap intervals.

All numpy, no model and no file. Shape legend: Q queries, C candidates or classes, N samples, S bootstrap resamples.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
NORMALISER = "lower-case, no punctuation, single spaces"


def normalise(text: str) -> str:
    """`text` in lower case, hyphens as spaces, every other punctuation mark or symbol dropped, single spaces."""
    spaced = re.sub(r"[-‐‑‒–—/]", " ", text.lower())
    kept = "".join(letter for letter in spaced if unicodedata.category(letter)[0] not in "PS")
    return " ".join(kept.split())


# ---- words ----------------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """One step from reference to hypothesis: `kind` is equal, substitute, delete or insert; the absent word is ""."""

    kind: str
    reference: str
    hypothesis: str


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """The fewest edits (Levenshtein over words) that turn `reference` into `hypothesis`, equal words included."""
    table = _edit_distances(reference, hypothesis)
    row, column, edits = len(reference), len(hypothesis), []
    while row or column:
        if row and column:
            changed = reference[row - 1] != hypothesis[column - 1]
            if table[row, column] == table[row - 1, column - 1] + changed:
                row, column = row - 1, column - 1
                edits.append(Edit("substitute" if changed else "equal", reference[row], hypothesis[column]))
                continue
        if row and table[row, column] == table[row - 1, column] + 1:
            row -= 1
            edits.append(Edit("delete", reference[row], ""))
        else:
            column -= 1
            edits.append(Edit("insert", "", hypothesis[column]))
    return edits[::-1]


def word_errors(reference: str, hypothesis: str) -> int:
    """Substitutions, deletions and insertions between two normalised texts."""
    return int(_edit_distances(reference.split(), hypothesis.split())[-1, -1])


def word_f1(hypothesis: str, references: Sequence[str]) -> float:
    """Overlap of words (with their counts) between normalised texts, as F1 in [0, 1]; the best reference counts."""
    words = Counter(hypothesis.split())
    best = 0.0
    for reference in references:
        others = Counter(reference.split())
        total = words.total() + others.total()
        best = max(best, 2 * (words & others).total() / total if total else 0.0)
    return best


def _edit_distances(reference: Sequence[str], hypothesis: Sequence[str]) -> np.ndarray:
    """(len(reference) + 1, len(hypothesis) + 1) int64: fewest edits between the first i and the first j words."""
    numbers = {word: number for number, word in enumerate({*reference, *hypothesis})}
    target = np.array([numbers[word] for word in hypothesis], np.int64)
    steps = np.arange(len(target) + 1)
    table = np.empty((len(reference) + 1, len(target) + 1), np.int64)
    table[0] = steps
    for row, word in enumerate(reference, start=1):
        table[row] = table[row - 1] + 1
        table[row, 1:] = np.minimum(table[row, 1:], table[row - 1, :-1] + (target != numbers[word]))
        table[row] = np.minimum.accumulate(table[row] - steps) + steps  # insertions, all columns at once
    return table


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

    `groups` (N,) int names what is drawn together: narrations of one picture are not independent. The same groups and
    seed are drawn alike for other values too, so that their draws are paired.
    """
    sizes = np.ones(len(values)) if sizes is None else sizes
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    over, under = np.bincount(groups, weights=values), np.bincount(groups, weights=sizes)
    random, count = np.random.default_rng(seed), len(over)
    ratios, done = np.empty(RESAMPLES), 0
    while done < RESAMPLES:  # in pieces, so that 25,000 queries need no more memory than 200
        piece = min(RESAMPLES - done, max(1, 4_000_000 // count))
        drawn = random.multinomial(count, np.full(count, 1 / count), size=piece).astype(np.float64)
        ratios[done : done + piece] = (drawn @ over) / np.maximum(drawn @ under, 1e-300)
        done += piece
    return ratios


def interval(draws: np.ndarray, value: float | None = None) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws (S,), moved so that their mean is `value` where it is given.

    Average precision rises when samples repeat, so its draws lie above the value; means and ratios need no such move.
    """
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, [2.5, 97.5]) - (0.0 if value is None else draws.mean() - value)
    return float(low), float(high)
