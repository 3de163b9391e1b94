"""The work items one after the other in this process: no processes to start, and nobody to watch over it."""

from __future__ import annotations

from collections.abc import Sequence

from feature_extract.extractors import Extractors
from feature_extract.runners.supervise import Limits, Tally, stop_requests
from feature_extract.work import Setup, WorkItem, extract_shard
from opt.config import RunAgain
from opt.data.manifest import Failure
from opt.progress import Progress


def run_here(
    todo: Sequence[WorkItem], setup: Setup, extractors: Extractors, limits: Limits, tally: Tally, bar: Progress
) -> None:
    """Do all work items. Raises RunAgain when SIGTERM asked to stop, after the shard in hand."""

    def on_row(row: int, failures: list[Failure]) -> None:
        tally.add(failures)
        bar.advance(1, tally.note())
        tally.check(limits)

    with stop_requests() as stop:
        for number, work in enumerate(todo):
            if stop.is_set():
                raise RunAgain(f"stopped as asked; {len(todo) - number} shards are left")
            extract_shard(work, extractors, setup, on_row)
