"""In how many pictures does the region detector find an object that the caption names?

The same is asked of the true pictures, for what the codes lose and what the detector misses, and of captions of other
pictures, which is chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.naming import LabelFinder
from eval.pictures.gallery import GENERATED, KINDS, Judged, Seen
from eval.result import Metric, measured
from eval.task import Task

NAME = "text_to_image.object_found"
SAID = 3
"""So many objects found are named in a phrase."""


class ObjectFound:
    """The judge that compares what the detector finds with what the caption names. `classes`: () without names."""

    def __init__(self, task: Task, numbers: np.ndarray, classes: Sequence[str], confidence: float, drawn: str) -> None:
        self.task, self.classes, self.confidence, self.drawn = task, tuple(classes), confidence, drawn
        finder = LabelFinder(classes)
        self.named = {number: finder.find(task.split.captions[number] or "") for number in numbers.tolist()}
        """The classes that each caption names, by sample number."""
        self.found: dict[str, dict[int, frozenset[str]]] = {kind: {} for kind in KINDS}
        """The classes found in each picture, by kind and sample number."""

    def look(self, kind: str, seen: Sequence[Seen]) -> None:
        for one in seen:
            if one.regions is not None and self.classes:
                sure = one.regions.classes[one.regions.scores >= self.confidence]
                self.found[kind][one.number] = frozenset(self.classes[number] for number in sure)

    def judged(self) -> Judged:
        metrics: list[Metric] = []
        absent: dict[str, str] = {}
        asked = [number for number, names in self.named.items() if names]
        for kind, found in self.found.items():
            if numbers := [number for number in asked if number in found]:
                metrics.append(self._metric(kind, np.array(numbers)))
            elif not self.classes:
                absent[NAME + kind] = "the detector's classes have no names"
            else:
                absent[NAME + kind] = "no picture of this kind" if asked else "no caption names a class of the detector"
        return Judged(metrics, absent)

    def misses(self) -> list[int]:
        """Sample numbers of generated pictures without any object that their caption names; most named ones first."""
        found = self.found[GENERATED]
        asked = {number: names for number, names in self.named.items() if names and number in found}
        missed = [number for number, names in asked.items() if not names & found[number]]
        return sorted(missed, key=lambda number: -len(self.named[number]))

    def seen(self, number: int) -> str:
        """What the detector found in the generated picture of a sample, in a phrase; "" where it did not look."""
        found = self.found[GENERATED].get(number)
        return "" if found is None else f"found: {', '.join(sorted(found)) or 'nothing'}"

    def failure(self, number: int) -> str:
        """What went wrong with the generated picture of a sample among `misses`, in a phrase."""
        named, found = sorted(self.named[number]), sorted(self.found[GENERATED][number])
        missed = f"no {named[0]} found" if len(named) == 1 else f"none of {len(named)} named objects found"
        return missed + (f", but {', '.join(found[:SAID])}" if found else "") + (" ..." if len(found) > SAID else "")

    def _metric(self, kind: str, numbers: np.ndarray) -> Metric:
        """Share of pictures with a named object; chance: one that another's caption names."""
        found, named = self.found[kind], self.named
        hits = [bool(found[number] & named[number]) for number in numbers.tolist()]
        partners = zip(numbers.tolist(), self.task.strangers(numbers).tolist(), strict=True)
        return measured(
            NAME + kind,
            np.array(hits, np.float64),
            self.task.provenance.seed,
            chance=float(np.mean([bool(found[number] & named[other]) for number, other in partners])),
            chance_method="the same pictures, captions of others",
            protocol="object-found/detector",
            modalities=("text",) if kind == GENERATED else ("image",),
            direction="text -> image",
            normaliser=f"detector score of at least {self.confidence}; noun and modifiers in one noun phrase",
            note=self.drawn if kind == GENERATED else "",
        )
