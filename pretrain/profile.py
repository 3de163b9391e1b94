"""`--profile N`: where the time of a few steps goes, operator by operator.

    run/profile/trace.json   every operator and kernel on a time line; opens in Perfetto or chrome://tracing
    run/profile/table.txt    the ten dearest operators
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from opt.distributed import rank
from opt.files import make_folder, write_atomic

SKIPPED, WARM = 2, 1
"""Steps before anything is recorded: the first ones allocate and compile, one more starts the profiler."""
OPERATORS = 10


class Profile:
    """A context around training: call `step` after each step. `steps` of them are recorded, in the first process.

    A run that ends sooner leaves what it came to.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities, schedule=schedule(wait=SKIPPED, warmup=WARM, active=steps, repeat=1),
            on_trace_ready=self._write, record_shapes=True,
        ) if rank() == 0 else None

    def __enter__(self) -> Profile:
        if self._profile is not None:
            make_folder(self.folder)
            self._profile.start()
        return self

    def step(self) -> None:
        """One more step is done."""
        if self._profile is not None:
            self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        place = "cuda" if torch.cuda.is_available() else "cpu"
        table = recorded.key_averages().table(sort_by=f"self_{place}_time_total", row_limit=OPERATORS)
        write_atomic(self.folder / "table.txt", table.encode())
        unfinished = self.folder / ".trace.json"
        recorded.export_chrome_trace(str(unfinished))
        os.replace(unfinished, self.folder / "trace.json")
