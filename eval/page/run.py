"""What the pages show of a run: its results, its training, its settings, read from its folder.

    RUN/results/*.json, RUN/results/confusions.json, RUN/metrics.jsonl, RUN/config.json, RUN/seconds.json --> Run
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.page.words import TITLES
from eval.result import Metric, Result, read_result
from opt.config import UserError

CONFUSIONS = "confusions.json"
"""Beside the results: what `opt eval transcribe` counts of words taken for others; the one JSON file there that is no
result."""


@dataclass(frozen=True)
class Run:
    """Everything the pages show. `pictures` is the results folder that example pictures are relative to."""

    name: str
    pictures: Path
    results: Mapping[str, Result]
    training: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    confusions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By what was given: words, substitutions, deletions, insertions, and confusions [(said, written, times), ...]."""

    @property
    def empty(self) -> bool:
        """Whether there is neither result nor training."""
        return not self.results and not self.training

    def found(self) -> dict[str, Metric]:
        """All figures by name."""
        return {metric.name: metric for result in self.results.values() for metric in result.metrics}


def read_run(folder: Path, name: str = "") -> Run:
    """A run's folder, under `name` or its own. Raises UserError for a file that is damaged."""
    results = _results(folder / "results")
    training, validation = _training(folder / "metrics.jsonl")
    return Run(
        name or folder.resolve().name, folder / "results", results, training, validation,
        _json(folder / "config.json"), _seconds(folder, results), _confusions(folder / "results" / CONFUSIONS),
    )  # fmt: skip


def _results(folder: Path) -> dict[str, Result]:
    """Results by task, in the pages' order. Raises UserError for a JSON file that is none."""
    found = {path.stem: read_result(path) for path in sorted(folder.glob("*.json")) if path.name != CONFUSIONS}
    known = [task for task in TITLES if task in found]
    return {task: found[task] for task in [*known, *(task for task in found if task not in known)]}


def _confusions(path: Path) -> dict[str, dict[str, Any]]:
    """Counts of words taken for others. Raises UserError for a file that holds something else."""
    found = _json(path)
    try:
        for counts in found.values():
            if any(not isinstance(counts[kind], int) for kind in ("words", "substitutions", "deletions", "insertions")):
                raise TypeError("no counts")
            if any([type(part) for part in entry] != [str, str, int] for entry in counts["confusions"]):
                raise TypeError("no confusions")
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is not what `opt eval transcribe` writes ({error}); run it again") from error
    return found


def _training(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl, of training and of validation; one cut short by a kill or damaged is dropped."""
    lines, validations = [], []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            if not math.isfinite(line["step"]):
                continue
            if "validation" in line:
                validations.append({**_losses(line["validation"]), "step": line["step"]})
            elif line["loss"] is not None or line["skipped_steps"] > 0:
                lines.append({**line, **_losses(line)})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return lines, validations


def _losses(line: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and losses of a line as finite numbers; those that are none are left out. Raises where it has no such thing.
    """
    losses = {name: float(value) for name, value in line.get("losses", {}).items() if math.isfinite(value)}
    if line["loss"] is not None and not math.isfinite(line["loss"]):
        raise ValueError("a loss must be finite")
    return {"loss": line["loss"], "losses": losses}


def _seconds(folder: Path, results: dict[str, Result]) -> dict[str, float]:
    """Times of the stages from seconds.json where there is one, of the evaluations from their results otherwise."""
    path = folder / "seconds.json"
    stages = _json(path)
    for name, value in stages.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{path}: {name!r} must be a number of seconds, it is {value!r}; delete the file")
    return {name: float(value) for name, value in stages.items()} or {task: r.seconds for task, r in results.items()}


def _json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty when there is no such file. Raises UserError when it is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content
