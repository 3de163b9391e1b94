"""The section on training: what metrics.jsonl says, as small charts, of one run or of several on common axes.

    loss with validation and its best step · a chart an objective · speed, share of peak, waiting, gradient, memory

A chart is left out when its numbers are missing, as in runs made before they were written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from eval.page.dots import COLOURS
from eval.page.lines import Line, Overlay, curve, overlay
from eval.page.markup import Markup, element, joined
from eval.page.run import Run

Points = list[tuple[float, float]]
WIDE = 620
DASHES = 4
"""Ways of dashing in page.css, one for each time that the colours of runs begin again."""
SPREAD = 30
"""A gradient norm whose largest value is so many times its smallest is drawn by factors."""


def training(run: Run) -> Markup | None:
    """Losses, then how the machine was used."""
    if len(run.training) < 2:
        return None
    losses = [chart for chart in (_loss(run), *_objectives(run)) if chart is not None]
    machine = [chart for chart in _machine(run.training) if chart is not None]
    return joined([
        element("h2", "Training"),
        element("p", " · ".join(_facts(run)), class_="hint"),
        element("p", "Faint: every value; strong: a running mean. docs/opt.md says what the objectives of OPT are.",
                class_="hint"),
        element("div", losses, class_="curves"),
        [element("h3", "Speed, gradient and memory"), element("div", machine, class_="curves")] if machine else None,
    ])  # fmt: skip


def together(runs: Sequence[Run]) -> Markup | None:
    """The loss and every objective of all runs, one chart each; the legend names the lines."""
    trained = {place: run for place, run in enumerate(runs) if len(_points(run.training, "loss")) > 1}
    if not trained:
        return None
    objectives = dict.fromkeys(name for run in trained.values() for line in run.training for name in line["losses"])
    charts = [_of_all(trained, "loss, all objectives", {place: _points(run.training, "loss")
                                                        for place, run in trained.items()}, WIDE)]
    for name in objectives:
        points = {place: [(line["step"], line["losses"][name]) for line in run.training if name in line["losses"]]
                  for place, run in trained.items()}  # fmt: skip
        charts.append(_of_all(trained, name, points))
    legend = [element("span", element("span", place + 1, class_=f"number run-{place % COLOURS}"), f" {run.name}")
              for place, run in trained.items()]  # fmt: skip
    return joined([
        element("h2", "Training"),
        element("p", "Running means of the training losses by step.", class_="hint"),
        element("p", legend, class_="small legend"),
        element("div", charts, class_="curves"),
    ])  # fmt: skip


def _of_all(runs: Mapping[int, Run], title: str, points: Mapping[int, Points], width: int = 300) -> Markup | None:
    """One loss of the runs that have it."""
    lines = [
        Overlay(f"{place + 1} {runs[place].name}", f"run-{place % COLOURS} dash-{place // COLOURS % DASHES}", some)
        for place, some in points.items() if len(some) > 1
    ]  # fmt: skip
    return overlay(title, lines, width) if lines else None


def _loss(run: Run) -> Markup | None:
    """All objectives together; validated, beside the held-out loss and its lowest point."""
    points, held_out = _points(run.training, "loss"), _points(run.validation, "loss")
    if len(points) < 2:
        return None
    second = Line("validation", held_out) if held_out else None
    best = min(held_out, key=lambda point: point[1]) if held_out else None
    return curve("loss, all objectives", Line("training", points), second, best, width=WIDE)


def _objectives(run: Run) -> list[Markup]:
    """A chart an objective, in the order they appear."""
    charts = []
    for name in dict.fromkeys(name for line in run.training for name in line["losses"]):
        points = [(line["step"], line["losses"][name]) for line in run.training if name in line["losses"]]
        held_out = [(line["step"], line["losses"][name]) for line in run.validation if name in line["losses"]]
        if len(points) > 1:
            charts.append(curve(name, Line(name, points), Line("validation", held_out) if held_out else None))
    return charts


def _machine(lines: Sequence[Mapping[str, Any]]) -> list[Markup | None]:
    norms = [y for _, y in _points(lines, "gradient_norm")]
    spread = len(norms) > 1 and min(norms) > 0 and max(norms) / min(norms) > SPREAD
    return [
        _chart(lines, "real tokens a second", "tokens_per_second", "padded_tokens_per_second", "padded", zero=True),
        _chart(lines, "share of peak FLOP/s (MFU)", "mfu", zero=True, unit=" %"),
        _chart(lines, "waiting for data", "wait_share", zero=True, unit=" %"),
        _chart(lines, "gradient norm", "gradient_norm", log=spread),
        _chart(lines, "memory, GiB", "memory_gib", zero=True),
        _chart(lines, "steps skipped, so far", "skipped_steps", total=True, zero=True),
        _chart(lines, "learning rate", "learning_rate", zero=True),
    ]


def _chart(lines: Sequence[Mapping[str, Any]], title: str, key: str, second: str = "", second_name: str = "",
           total: bool = False, unit: str = "", **how: Any) -> Markup | None:
    """One figure of the lines over the steps. total: its running sum, left out while that is nought."""
    factor = 100 if unit == " %" else 1
    points = [(x, factor * y) for x, y in _points(lines, key)]
    beside = [(x, factor * y) for x, y in _points(lines, second)]
    if total:
        points = list(zip([x for x, _ in points], accumulate(y for _, y in points), strict=True))
    if len(points) < 2 or (total and not points[-1][1]):
        return None
    return curve(title, Line(title, points), Line(second_name, beside) if len(beside) > 1 else None, unit=unit, **how)


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of every line that has the value as a finite number."""
    pairs = [(line["step"], line.get(key)) for line in lines]
    return [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _facts(run: Run) -> list[str]:
    """The run in a line of words."""
    last = run.training[-1]
    facts = [f"{last['step']:,} steps"]
    facts += [f"{last['seconds'] / 60:.1f} minutes"] if "seconds" in last else []
    says: list[tuple[str, Callable[[list[float]], str]]] = [
        ("tokens_per_second", lambda values: f"{_median(values):,.0f} tokens a second (median)"),
        ("mfu", lambda values: f"{100 * _median(values):.1f} % of peak FLOP/s (median)"),
        ("wait_share", lambda values: f"{100 * sum(values) / len(values):.1f} % waiting for data"),
        ("skipped_steps", lambda values: f"{sum(values):,.0f} steps skipped" if any(values) else ""),
    ]
    for key, say in says:
        values = [y for _, y in _points(run.training, key)]
        facts += [say(values)] if values else []
    if held_out := _points(run.validation, "loss"):
        step, loss = min(held_out, key=lambda point: point[1])
        facts.append(f"best validation {loss:.3f} at step {step:,}")
    return [fact for fact in facts if fact]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
