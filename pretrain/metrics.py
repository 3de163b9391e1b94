"""Metrics of a run: sums kept on the device between logging steps, one JSON line each in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.files import write_atomic
from opt.objectives.term import Term


class Meter:
    """Sums since the last `line`: no value leaves the device before that."""

    def __init__(self) -> None:
        self._reset(0.0)

    def _reset(self, waited: float) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._steps = self._tokens = 0
        self._waited, self._began = waited, time.perf_counter()

    def add(self, terms: Mapping[str, Term], loss: Tensor, tokens: int) -> None:
        """One step's terms, loss and real tokens."""
        for name, term in terms.items():
            self._totals[name] = self._totals.get(name, torch.zeros_like(term.total)) + term.total.detach()
            self._counts[name] = self._counts.get(name, torch.zeros_like(term.count)) + term.count
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        self._steps += 1
        self._tokens += tokens

    def line(self, waited: float) -> dict[str, Any]:
        """Means since the last call, of what counted. `waited`: seconds that the loop has waited for data so far."""
        seconds = time.perf_counter() - self._began
        counted = {name: total for name, total in self._totals.items() if self._counts[name] > 0}
        losses = {name: float(total / self._counts[name]) for name, total in counted.items()}
        assert self._loss is not None
        values = {
            "loss": float(self._loss) / self._steps,
            "losses": losses,
            "seconds": seconds,
            "tokens_per_second": round(self._tokens / seconds, 1),
            "wait_share": round((waited - self._waited) / seconds, 4),
        }
        self._reset(waited)
        return values


class MetricsFile:
    """metrics.jsonl of a run: one line a logging step. Opened at a step to go on from, it drops later lines."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
        self.seconds = max([json.loads(line)["seconds"] for line in kept], default=0.0)

    def append(self, values: dict[str, Any]) -> None:
        """Write one line now."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    """The step of a line; infinity for one that a kill cut short or that is no line of ours."""
    try:
        values = json.loads(line)
        return int(values["step"]) if math.isfinite(values["seconds"]) else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
