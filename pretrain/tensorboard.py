"""`--tensorboard`: the lines of metrics.jsonl as TensorBoard's curves, in run/tensorboard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opt.config import UserError, extra
from opt.distributed import rank


class TensorBoard:
    """Takes the lines that MetricsFile takes; the first process writes. Made at a step to go on from, it hides what an
    earlier start wrote beyond. Raises UserError where TensorBoard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--tensorboard needs a package that is missing ({error}); {extra('tensorboard')}, or leave it out"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1) if rank() == 0 else None

    def append(self, values: Mapping[str, Any]) -> None:
        """One line: every number under its name, those inside others as outer/inner."""
        if self._writer is None:
            return
        for name, value in _numbers(values):
            if name != "step":
                self._writer.add_scalar(name, value, values["step"])
        self._writer.flush()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value
