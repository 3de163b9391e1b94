"""Metrics of a run: sums kept on the device between logging steps, one JSON line each in metrics.jsonl.

    add     once a micro-batch: this process's share of the terms   \\
    step    once a step: whether it was kept, and its gradient norm  > no value leaves the device
    line    once in a while, on every process: sums over all of them --> the values of a line
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from opt.data.batch import Batch
from opt.distributed import rank, sum_over_ranks, world
from opt.objectives.term import Term
from pretrain.estimate import Peak, Work
from pretrain.lines import keep_until


class Meter:
    """Sums since the last `line`. `measure` says what a step asks for; without it there is no mfu."""

    def __init__(self, work: Work | None = None, peak: Peak | None = None) -> None:
        self.work, self.peak = work, peak
        self._waited = 0.0
        self._reset(0.0)

    def measure(self, work: Work, peak: Peak) -> None:
        """What a micro-batch asks for, and what the processor could do: from now on lines hold their ratio."""
        self.work, self.peak = work, peak

    def _reset(self, waited: float) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._open: Tensor | None = None
        self._steps = self._tokens = self._padded = 0
        self._waited, self._paused, self._began = waited, 0.0, time.perf_counter()

    def add(self, terms: Mapping[str, Term], loss: Tensor, batch: Batch) -> None:
        """One micro-batch: this process's share of the terms (counts are those of the whole step) and of the loss."""
        totals = torch.stack([loss, *(term.total for term in terms.values())]).detach().double()
        counts = torch.stack([term.count.to(loss.device, torch.float64) for term in terms.values()])
        shares = torch.cat([totals, counts / world()])
        if self._open is not None:  # totals add up over micro-batches; counts are the whole step's in each of them
            shares[: len(totals)] += self._open[: len(totals)]
        self._names, self._open = list(terms), shares
        self._tokens += batch.tokens
        self._padded += batch.padded

    def step(self, kept: Tensor, norm: Tensor) -> None:
        """The step is complete. What was added since the last one counts only if it was `kept` (bool, on the device).

        norm: of the gradient, the same on all processes.
        """
        if self._open is None:
            raise ValueError("a step without micro-batches; call add before step")
        values = torch.cat([self._open, torch.stack([norm.double(), torch.ones_like(norm).double()]) / world()])
        values = torch.where(kept, values, 0.0)
        self._sums = values if self._sums is None else self._sums + values
        self._open = None
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """So many seconds went into something else than training."""
        self._paused += seconds

    def line(self, waited: float) -> dict[str, Any]:
        """Means since the last call, over all processes; every process must call it.

        waited: seconds that this process has waited for data so far. A term that counted nothing is left out; loss and
        gradient_norm are None when no step was kept.
        """
        if self._sums is None:
            raise ValueError("no step since the last line")
        seconds = time.perf_counter() - self._began - self._paused
        names = ["loss", *self._names, *(f"count {name}" for name in self._names), "norm", "kept"]
        own = {**dict(zip(names, self._sums.tolist(), strict=True)), "tokens": self._tokens, "padded": self._padded,
               "waited": (waited - self._waited) / seconds / world()}
        summed = sum_over_ranks({name: torch.tensor(value, dtype=torch.float64) for name, value in own.items()})
        values = self._values({name: value.item() for name, value in summed.items()}, seconds)
        values["memory_gib"] = round(max(of_every_process(memory_in_use(self._sums.device))) / 2**30, 3)
        self._reset(waited)
        return values

    def _values(self, sums: dict[str, float], seconds: float) -> dict[str, Any]:
        kept = round(sums["kept"])
        losses = {name: sums[name] / sums[f"count {name}"] for name in self._names if sums[f"count {name}"] > 0}
        return {
            "loss": sums["loss"] / kept if kept else None,
            "losses": losses,
            "gradient_norm": sums["norm"] / kept if kept else None,
            "skipped_steps": self._steps - kept,
            "seconds": seconds,
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "padded_tokens_per_second": round(sums["padded"] / seconds, 1),
            **self._share_of_peak(sums["tokens"] / seconds),
            "wait_share": round(sums["waited"], 4),
        }

    def _share_of_peak(self, tokens_per_second: float) -> dict[str, float]:
        """Operations of real tokens a second over what all processors could do (MFU)."""
        if self.work is None or self.peak is None or not self.work.tokens:
            return {}
        flops_per_second = tokens_per_second * self.work.flops / self.work.tokens
        return {"mfu": round(flops_per_second / (world() * self.peak.flops_per_second), 4),
                "peak_flops": self.peak.flops_per_second}


def of_every_process(value: float) -> list[float]:
    """The value that each process gives, by rank; every process must ask."""
    own = {str(other): torch.tensor(value * (other == rank()), dtype=torch.float64) for other in range(world())}
    summed = sum_over_ranks(own)
    return [summed[str(other)].item() for other in range(world())]


def memory_in_use(device: torch.device) -> int:
    """Bytes: on CUDA the most that was allocated since the last call, on a CPU what the process holds now."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far, in bytes on macOS
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def note(values: Mapping[str, Any]) -> str:
    """A line in a few words, for the progress bar."""
    if "validation" in values:
        return f"validation {values['validation']['loss']:.3f}"
    said = f"{values['tokens_per_second']:,.0f} tokens/s, waiting {values['wait_share']:.0%}"
    return f"loss {values['loss']:.3f}, {said}" if values["loss"] is not None else f"all steps skipped, {said}"


class Sink(Protocol):
    """Where lines go besides the file: pretrain/tensorboard.py."""

    def append(self, values: Mapping[str, Any]) -> None: ...


class MetricsFile:
    """metrics.jsonl of a run: a line a logging step, a line a validation; the first process writes them.

    Opened at a step to go on from, it drops later lines. `seconds` of a line count from the run's beginning.
    """

    def __init__(self, path: Path, step: int, sink: Sink | None = None) -> None:
        self.path, self.sink, self.seconds = path, sink, 0.0
        if rank() > 0:
            return
        kept = keep_until(path, step)
        self.seconds = max([line.get("seconds", 0.0) for line in kept], default=0.0)

    def append(self, values: Mapping[str, Any]) -> str:
        """Write one line now, and say it in a few words."""
        if "seconds" in values:
            self.seconds += values["seconds"]
            values = {**values, "seconds": round(self.seconds, 3)}
        if rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
            if self.sink is not None:
                self.sink.append(values)
        return note(values)
