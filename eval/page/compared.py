"""The same figure of several runs: which of them may be compared, and which is better beyond its interval.

Runs are compared in a figure when they measured it on the same split, in the same way, among the same candidates, on as
many samples. Most of them decide what "the same" is, of equals the first run; the others are marked and stand apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eval.page.run import Run
from eval.page.words import in_order, is_gain
from eval.result import Metric


class Key(NamedTuple):
    """How a figure was measured. Its fields are those of `SIGNS`."""

    split: str
    """Hash of the samples' keys: other features of the same samples make the same split."""
    way: tuple[str, str, int | None, str]
    candidates: str
    n: int


SIGNS = {
    "split": ("a", "measured on another split"),
    "way": ("b", "measured another way (protocol, normaliser, direction or candidates scored again)"),
    "candidates": ("c", "among other candidates"),
    "n": ("d", "on another number of samples"),
}
"""What a run is marked with where it was not measured as the others of its row."""
RULE = (
    "A figure is bold when it is the best of its row and its 95 % interval overlaps that of no other run; the figures "
    "of two runs come without paired samples, so this is a careful test. Without intervals nothing is bold. Figures "
    "measured in another way than most of their row are grey with a letter, and compared with nothing."
)


@dataclass(frozen=True)
class Compared:
    """A figure of several runs, in their order; None where a run lacks it."""

    metrics: tuple[Metric | None, ...]
    signs: tuple[str, ...]
    """Letters of `SIGNS` that set a run apart from the row; empty for those that compare."""
    best: int | None
    """The run that is better than all others it compares with, beyond their intervals."""

    @property
    def first(self) -> Metric:
        """The figure of the first run that compares: its name, unit and words."""
        pairs = zip(self.metrics, self.signs, strict=True)
        return next(metric for metric, signs in pairs if metric is not None and not signs)

    @property
    def equals(self) -> list[Metric]:
        """The figures that compare."""
        pairs = zip(self.metrics, self.signs, strict=True)
        return [metric for metric, signs in pairs if metric is not None and not signs]


def compare(runs: Sequence[Run], task: str) -> list[Compared]:
    """All figures that at least one run has of `task`, in the pages' order."""
    results = [run.results.get(task) for run in runs]
    found = [{} if result is None else {metric.name: metric for metric in result.metrics} for result in results]
    firsts = {name: metric for metrics in reversed(found) for name, metric in metrics.items()}
    names = dict.fromkeys(name for metrics in found for name in metrics)
    provenances = [None if result is None else result.provenance for result in results]
    splits = ["" if about is None else about.split_keys_sha256 or about.split_sha256 for about in provenances]
    return [
        _compared([metrics.get(first.name) for metrics in found], splits)
        for first in in_order(firsts[name] for name in names)
    ]


def _compared(metrics: Sequence[Metric | None], splits: Sequence[str]) -> Compared:
    keys = [None if metric is None else _key(metric, split) for metric, split in zip(metrics, splits, strict=True)]
    usual = Counter(key for key in keys if key is not None).most_common(1)[0][0]
    signs = tuple("" if key is None else _signs(key, usual) for key in keys)
    return Compared(tuple(metrics), signs, _best(metrics, signs))


def _key(metric: Metric, split: str) -> Key:
    way = (metric.protocol, metric.normaliser, metric.rerank_k, metric.direction)
    return Key(split, way, metric.candidates, metric.n)


def _signs(key: Key, usual: Key) -> str:
    return "".join(SIGNS[name][0] for name in Key._fields if getattr(key, name) != getattr(usual, name))


def _best(metrics: Sequence[Metric | None], signs: Sequence[str]) -> int | None:
    """The place of the best figure when its interval lies beyond that of every other it compares with."""
    rivals = {place: metric for place, metric in enumerate(metrics) if metric is not None and not signs[place]}
    first = next(iter(rivals.values()))
    if len(rivals) < 2 or is_gain(first) or any(metric.interval is None for metric in rivals.values()):
        return None
    lower = first.better == "lower"
    best = min(rivals, key=lambda place: rivals[place].value if lower else -rivals[place].value)
    low, high = rivals[best].interval or (0.0, 0.0)
    ends = [metric.interval or (0.0, 0.0) for place, metric in rivals.items() if place != best]
    beyond = all(high < other_low if lower else low > other_high for other_low, other_high in ends)
    return best if beyond else None


def reason(run: Run, task: str, name: str) -> str:
    """Why a run has no such figure: what its result says, of this figure or of what it belongs to."""
    result = run.results.get(task)
    if result is None:
        return "this evaluation was not run"
    said = [absent for absent in result.absent if name == absent or name.startswith((f"{absent}.", f"{absent}_"))]
    return result.absent[max(said, key=len)] if said else "its result has no such figure"
