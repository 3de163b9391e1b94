"""One page from a run, or from several side by side: results, curves and pictures in a file that needs nothing else.

    RUN/results/*.json, RUN/metrics.jsonl, RUN/config.json, RUN/seconds.json --> RUN/report.html, RUN/summary.json
    the same of several runs                                                 --> comparison.html

Whatever is missing is left out of the page and named there. No model is loaded; the pages are in eval/page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from eval.page import comparison, single
from eval.page.run import Run, read_run
from eval.result import results_table
from opt.config import UserError
from opt.files import make_folder, write_atomic

WAY_OUT = "give the folder of a run, and run `opt eval ...` on its model first"


@dataclass
class ReportConfig:
    """Options of `opt report`."""

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs, such as runs/demo: each holds results/ and, of training, metrics.jsonl and config.json."""
    out: Path | None = None
    """The page to write: by default report.html in the folder of the one run, comparison.html here for several."""


def report(config: ReportConfig) -> None:
    """Make one self-contained page of a run's figures, curves and pictures, or of several runs side by side.

    Example: opt report runs/demo runs/second --out comparison.html
    """
    if not config.runs:
        raise UserError("no RUN given: name the folder of a run, or of several, such as runs/demo")
    if len(config.runs) == 1:
        _of_one(config.runs[0], config.out)
    else:
        _of_several(config.runs, config.out or Path("comparison.html"))


def _of_one(folder: Path, out: Path | None) -> None:
    run = read_run(folder)
    if run.empty:
        raise UserError(f"{folder} holds neither results/*.json nor metrics.jsonl; {WAY_OUT}")
    figures = summary(run)
    write_atomic(folder / "summary.json", (json.dumps(figures, indent=1) + "\n").encode())
    path = out or folder / "report.html"
    make_folder(path.parent)
    write_atomic(path, single.page(run).encode())
    for result in run.results.values():
        print(results_table([result]), end="\n\n")
    if run.training:
        print(f"training: {len(run.training):,} lines of metrics, the last of step {run.training[-1]['step']:,}, loss "
              f"{run.training[-1]['loss']}")
    print(f"{len(figures)} figures in {folder / 'summary.json'}\nreport: {path}")


def _of_several(folders: Sequence[Path], path: Path) -> None:
    gone = [folder for folder in folders if not folder.is_dir()]
    if gone:
        raise UserError(f"{gone[0]} is no folder; give the folders of runs")
    runs = [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    if all(run.empty for run in runs):
        raise UserError(f"none of the folders holds results/*.json or metrics.jsonl; {WAY_OUT}")
    make_folder(path.parent)
    write_atomic(path, comparison.page(runs).encode())
    for run in runs:
        print(f"{run.name}: " + ("nothing to show" if run.empty else f"{len(run.found())} figures of "
              f"{len(run.results)} evaluations, {len(run.training):,} lines of training"))  # fmt: skip
    print(f"report: {path}")


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises UserError for a folder given twice."""
    parts = [folder.resolve().parts for folder in folders]
    twice = [place for place, count in Counter(parts).items() if count > 1]
    if twice:
        raise UserError(f"{Path(*twice[0])} is given twice; name every run once")
    kept = [1] * len(parts)
    while True:
        ends = ["/".join(path[-count:]) for path, count in zip(parts, kept, strict=True)]
        same = Counter(ends)
        if len(same) == len(ends):
            return ends
        kept = [count + (same[end] > 1) for count, end in zip(kept, ends, strict=True)]


def summary(run: Run) -> dict[str, float]:
    """All figures by name, flat; times as seconds.NAME."""
    figures = {metric.name: metric.value for metric in run.found().values()}
    return figures | {f"seconds.{name}": value for name, value in run.seconds.items()}
