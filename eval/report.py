"""One page from a run: results, curves and pictures in a single HTML file that needs nothing else, and a flat summary.

    RUN/results/*.json, RUN/metrics.jsonl, RUN/config.json, RUN/seconds.json --> RUN/report.html, RUN/summary.json

Whatever is missing is left out of the page and named there. No model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from eval.page import page
from eval.result import Result, read_result, results_table
from eval.sections import TITLES, Run
from opt.config import UserError
from opt.files import write_atomic


@dataclass
class ReportConfig:
    """Options of `opt report`."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of a run, such as runs/demo: holds results/ and, of training, metrics.jsonl and config.json."""


def report(config: ReportConfig) -> None:
    """Make one self-contained page of a run's figures, curves and pictures, and a flat summary of the figures.

    Example: opt report runs/demo
    """
    run = read_run(config.run)
    figures = summary(run)
    write_atomic(config.run / "summary.json", (json.dumps(figures, indent=1) + "\n").encode())
    path = config.run / "report.html"
    write_atomic(path, page(run).encode())
    if run.results:
        print(results_table(list(run.results.values())))
    if run.training:
        print(f"training: {len(run.training):,} lines of metrics, the last of step {run.training[-1]['step']:,}, loss "
              f"{run.training[-1]['loss']}")
    print(f"{len(figures)} figures in {config.run / 'summary.json'}\nreport: {path}")


def read_run(folder: Path) -> Run:
    """Everything in a run's folder that the page shows. Raises UserError when there is neither result nor training."""
    results = _results(folder / "results")
    training, validation = _training(folder / "metrics.jsonl")
    if not results and not training:
        raise UserError(
            f"{folder} holds neither results/*.json nor metrics.jsonl; give the folder of a run, "
            "and run `opt eval ...` on its model first"
        )
    name = folder.resolve().name
    return Run(name, folder / "results", results, training, validation, _json(folder / "config.json"),
               _seconds(folder, results))


def summary(run: Run) -> dict[str, float]:
    """All figures by name, flat; times as seconds.NAME."""
    figures = {metric.name: metric.value for result in run.results.values() for metric in result.metrics}
    return figures | {f"seconds.{name}": value for name, value in run.seconds.items()}


def _results(folder: Path) -> dict[str, Result]:
    """Results by task, in the page's order. Raises UserError for a JSON file that is none."""
    found = {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}
    known = [task for task in TITLES if task in found]
    return {task: found[task] for task in [*known, *(task for task in found if task not in known)]}


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
