"""Samples whose labels are known, and scores judged against these: average precision, and where the right labels stand.

    scores (N, C) --Truth.judge, judge_micro--> Score: the value, and that of every bootstrap resample

Shape legend: N samples, C classes, S bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eval.metrics import interval, mean_average_precision, micro_average_precision
from eval.result import Metric


class Score(NamedTuple):
    """mAP of some scores: the value and that of every bootstrap resample (S,); the scores it judges (N, C)."""

    value: float
    draws: np.ndarray
    scores: np.ndarray | None = None

    def metric(self, name: str, **about: Any) -> Metric:
        return Metric(name, self.value, interval=interval(self.draws, self.value), **about)

    def minus(self, other: Score) -> Score:
        """The paired difference: both must come from the same `Truth`."""
        return Score(self.value - other.value, self.draws - other.draws)


@dataclass(frozen=True)
class Truth:
    """labels (N, C) bool: what is there. verified (N, C) bool: labels that count for a sample; None: all of them.
    resamples (S, N): how often each sample counts in each bootstrap resample."""

    labels: np.ndarray
    verified: np.ndarray | None
    resamples: np.ndarray

    def judge(self, scores_NC: np.ndarray) -> Score:
        """Macro mAP, on the same resamples of pictures each time."""
        return self._judged(mean_average_precision, scores_NC)

    def judge_micro(self, scores_NC: np.ndarray) -> Score:
        """As `judge`, over all pairs of a sample and a class together."""
        return self._judged(micro_average_precision, scores_NC)

    def _judged(self, measure: Callable[..., np.ndarray], scores_NC: np.ndarray) -> Score:
        value = float(measure(scores_NC, self.labels, None, self.verified))
        return Score(value, measure(scores_NC, self.labels, self.resamples, self.verified), scores_NC)

    @property
    def counted(self) -> np.ndarray:
        """(N, C) bool: labels that count for each sample."""
        return np.ones_like(self.labels) if self.verified is None else self.verified

    @property
    def policy(self) -> str:
        """What holds for labels that nobody named, in words."""
        if self.verified is None:
            return "what is not labelled is absent"
        return f"only verified labels count, {self.verified.mean():.1%} of all pairs of sample and class"

    def chance(self) -> tuple[float, float]:
        """Macro and micro share of positives among labels that count, over the same classes as the measures."""
        there, all_C = self.labels.sum(0), self.counted.sum(0)
        return float((there[there > 0] / all_C[there > 0]).mean()), float(there.sum() / all_C.sum())

    def ranks(self, scores_NC: np.ndarray, row: int) -> np.ndarray:
        """Rank of each label of a sample among those that count, from 1; behind its equals."""
        return (scores_NC[row, self.counted[row]] >= scores_NC[row, self.labels[row], None]).sum(1)

    def ranking_precision(self, scores_NC: np.ndarray, row: int) -> float:
        """Average over a sample's labels of the share of labels among those ranked as high; 1: all stand in front."""
        ranks = np.sort(self.ranks(scores_NC, row))
        return float(np.mean(np.searchsorted(ranks, ranks, side="right") / ranks))

    def failure(self, scores_NC: np.ndarray, row: int) -> str:
        """Where a sample's labels stand, in words."""
        ranks = sorted(int(rank) for rank in self.ranks(scores_NC, row))
        which = "rank" if len(ranks) == 1 else "ranks"
        return f"its labels at {which} {', '.join(map(str, ranks))} of {self.counted[row].sum()}"


def table(keys: Sequence[str], classes: Sequence[str], names: Mapping[str, frozenset[str]]) -> np.ndarray:
    """(len(keys), C) bool: which classes are among the names of each key; a key without a line has none."""
    columns = {name: column for column, name in enumerate(classes)}
    found_NC = np.zeros((len(keys), len(classes)), bool)
    for row, key in enumerate(keys):
        found_NC[row, [columns[name] for name in names.get(key, ()) if name in columns]] = True
    return found_NC
