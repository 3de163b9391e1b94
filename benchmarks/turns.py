"""Sides that take turns: whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from opt.data.batch import Batch
from opt.objectives.term import loss
from opt.systems.system import Progress, System

CLIP = 1.0


@dataclass
class Side:
    """One way of training. kernels: by name, steps that take a batch, of which the fastest is used.

    amounts: what each batch holds, "tokens" (real ones) and "samples"; weights: how much each batch counts.
    """

    change: str
    kernels: dict[str, Callable[[Any], Any]]
    batches: list[Any]
    amounts: dict[str, list[int]]
    weights: list[float]
    parameters: int
    kernel: str = ""
    threads: int = 1
    wall: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, list[float]] = field(default_factory=dict)

    def take(self, number: int, device: torch.device) -> None:
        """One timed step on a batch."""
        wall, cpu = timed(lambda: self.kernels[self.kernel](self.batches[number]), device)
        self.wall.setdefault(number, []).append(wall)
        self.cpu.setdefault(number, []).append(cpu)

    def seconds(self, clock: Literal["wall", "cpu"] = "wall") -> float:
        """Of a step; each batch's is the median of its repeats."""
        times = self.wall if clock == "wall" else self.cpu
        return self._mean([statistics.median(times[number]) for number in range(len(self.batches))])

    def amount(self, of: Literal["tokens", "samples"]) -> float:
        """Real tokens or samples of a step."""
        return self._mean(self.amounts[of])

    def _mean(self, values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True)) / sum(self.weights)

    def figures(self) -> dict[str, Any]:
        """What a JSON line says of a side."""
        tokens, wall, cpu = self.amount("tokens"), self.seconds(), self.seconds("cpu")
        return {
            "change": self.change, "tokens_per_second": round(tokens / wall, 1),
            "samples_per_second": round(self.amount("samples") / wall, 2),
            "tokens_per_cpu_second": round(tokens / cpu, 1), "step_seconds": round(wall, 4),
            "step_cpu_seconds": round(cpu, 4), "step_tokens": round(tokens), "kernel": self.kernel,
            "threads": self.threads, "parameters": self.parameters,
        }


def over(side: Side, baseline: Side, of: Literal["tokens", "samples"] = "tokens",
         clock: Literal["wall", "cpu"] = "wall") -> float:
    """How many times as fast as the baseline a side is."""
    ours, theirs = (each.amount(of) / each.seconds(clock) for each in (side, baseline))
    return round(ours / theirs, 3)


def take_turns(sides: Mapping[str, Side], repeats: int, threads: int, device: torch.device) -> None:
    """Give each side its kernel and threads, then let them take all of their batches `repeats` times, in turns.

    A turn begins with a step that is not timed: one that follows another side's finds caches and memory cold, as no
    step of a training does.
    """
    for side in sides.values():
        _choose(side, threads if device.type == "cpu" else 1, device)
    for _ in range(repeats):
        for side in sides.values():
            if device.type == "cpu":
                torch.set_num_threads(side.threads)
            side.kernels[side.kernel](side.batches[-1])
            for number in range(len(side.batches)):
                side.take(number, device)


def _choose(side: Side, most: int, device: torch.device) -> None:
    """The fastest kernel with `most` threads, then 1 thread where that is faster still: two tries each, on a batch."""
    fastest: dict[tuple[str, int], float] = {}

    def attempt(kernel: str, threads: int) -> None:
        torch.set_num_threads(threads)
        seconds = [timed(lambda: side.kernels[kernel](side.batches[0]), device)[0] for _ in range(2)]
        fastest[kernel, threads] = min(seconds)

    for kernel in side.kernels:
        attempt(kernel, most)
    if most > 1:
        attempt(min(fastest, key=lambda found: fastest[found])[0], 1)
    side.kernel, side.threads = min(fastest, key=lambda found: fastest[found])


def plain_step(model: System, optimizer: torch.optim.Optimizer, bfloat16: bool, device: torch.device,
               before: Callable[[], Any] = lambda: None) -> Callable[[Batch], None]:
    """A training step as one writes it. `before` is called at its beginning."""

    def step(batch: Batch) -> None:
        before()
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            output = model(batch, Progress(0, 0.0))
        loss(output.terms).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu
