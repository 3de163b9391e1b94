"""`--dry-run`: what a run would learn from, compute, hold in memory, write to disk, and how long it would take.

    plan --rows, tokens a step--> one micro-batch --pretrain/estimate.py--> operations, bytes
    a few real steps, of which nothing is written --> tokens a second, hours
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.corpora import Corpora
from opt.data.plan import Plan
from opt.distributed import sum_over_ranks, world
from opt.progress import counted, in_bytes
from opt.recipe import LoopConfig
from opt.systems.system import System
from pretrain.estimate import Memory, Work, available, memory, peak, state_memory, work
from pretrain.metrics import memory_in_use, of_every_process
from pretrain.parallel import counted_together, of_first, say

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

WARM, MEASURED = 1, 3
"""Steps before the clock starts, which allocate and compile, and steps on it."""
PLANNED = 32
"""Batches of the plan whose rows and tokens are averaged."""


def describe(trainer: Trainer, out: Path) -> None:
    """Say what would be trained, after trying a few steps; nothing is written. Every process must call it.

    Raises UserError where weights, gradients and moments alone exceed the memory there is.
    """
    for line in [*_system(trainer), *_data(trainer), *_batches(trainer)]:
        say(line)
    loader = iter(trainer.loader())
    batches, _ = next(loader)
    first = work(trainer.system, batches[0], trainer.bfloat16, trainer.device)
    needed, there = memory(trainer.system, first, trainer.loop.parallel, world()), _there(trainer)
    for line in [*_memory(needed, there), *_disk(trainer, out)]:
        say(line)
    if max(of_every_process(needed.total)) > there:
        say(_line("time", "not measured: the memory may not suffice"))
    else:
        rest = (batches for batches, _ in loader)
        for line in _expected(trainer, first, _measured(trainer, batches, rest)):
            say(line)
    say(_line("writes to", str(out)))


def require_memory(system: System, loop: LoopConfig, device: torch.device) -> None:
    """Raises UserError where no batch is small enough: weights, gradients and moments exceed the memory there is.

    Asked before the weights are made, of a system on the meta device. Every process must ask.
    """
    states = state_memory(system, loop.parallel, world()).states
    there = int(min(of_every_process(_part(device))))

    def refuse() -> None:
        if states > there:
            raise UserError(
                f"weights, gradients and moments take {in_bytes(states)} of memory and there are {in_bytes(there)} "
                f"({device.type}); share them among processes (torchrun, --loop.parallel fsdp), or choose a "
                "smaller model (--model); what a batch takes comes on top (--loop.batch-tokens, --loop.accumulate)"
            )

    of_first(refuse)


def _there(trainer: Trainer) -> int:
    """Bytes that the process which has least has for training: what its tensors hold, and its part of what is free."""
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = [*trainer.system.parameters(), *trainer.system.buffers(), *states]
    held = sum(_local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return int(min(of_every_process(_part(trainer.device) + held)))


def _part(device: torch.device) -> int:
    """What is free for this process: processes of one machine share its memory."""
    beside = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available(device) // beside


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _line(label: str, text: str) -> str:
    return f"{label:<11}{text}"


def _system(trainer: Trainer) -> Iterator[str]:
    system = trainer.system
    parameters = sum(parameter.numel() for parameter in system.parameters())
    words = f", {system.tokenizer.size:,} words in the vocabulary" if system.reads_text else ""
    yield _line("system", f"{system.name}: {parameters:,} parameters{words}")
    place = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else (
        f"CPU, {counted(torch.get_num_threads(), 'thread')} each")
    several = f" by {trainer.loop.parallel}" if world() > 1 else ""
    kind = "bfloat16" if trainer.bfloat16 else "float32"
    yield _line("runs on", f"{world()} x {place}{several}, matrix products in {kind}")


def _shares(plan: Plan) -> list[float]:
    """Of all rows, the part that comes from each corpus."""
    return [float(share / sum(plan.shares)) for share in plan.shares]


def _data(trainer: Trainer) -> Iterator[str]:
    """A line for each corpus."""
    plan, reader = trainer.plan(), trainer.reader
    places = [each.place for each in reader.readers] if isinstance(reader, Corpora) else [reader.place]
    ends = np.cumsum(plan.sizes)
    for place, size, end, share in zip(places, plan.sizes, ends.tolist(), _shares(plan), strict=True):
        costs = plan.costs[end - size : end].astype(np.int64)
        drawn = f"; {share:.1%} of the rows" if len(places) > 1 else ""
        yield _line("data", f"{place}: {counted(size, 'sample')} of {costs.mean() if size else 0:,.0f} tokens on "
                    f"average, {costs.sum():,} in all{drawn}")
    if trainer.validation is not None:
        loop = trainer.loop
        yield _line("validation", f"{counted(loop.validate_batches, 'batch')} of {len(trainer.validation.reader):,} "
                    f"samples, every {loop.validate_every:,} steps")


def _batches(trainer: Trainer) -> Iterator[str]:
    """Steps, rows, epochs, by the first batches of the plan."""
    loop, plan = trainer.loop, trainer.plan()
    ahead = list(islice(plan.batches(trainer.position), PLANNED))
    rows = float(np.mean([len(batch) for batch in ahead]))
    tokens = float(np.mean([plan.costs[batch.sample].sum() for batch in ahead]))
    begun = f", {trainer.step:,} of them done" if trainer.step else ""
    yield _line("steps", f"{loop.steps:,}{begun}")
    yield _line("batch", f"{rows:.1f} rows of {tokens:,.0f} tokens on average (at most {loop.batch_tokens:,}): "
                f"{world()} x {loop.accumulate} (processes x micro-batches)")
    if tokens > loop.batch_tokens:
        yield _line("", f"WARNING: --loop.multiple {loop.multiple} rows, the least of a batch, hold more than "
                    "--loop.batch-tokens; raise it, or lower --loop.multiple")
    yield _line("epochs", f"{loop.steps * rows / plan.samples_per_epoch:.2f}, {loop.steps * tokens:,.0f} tokens of "
                "samples")


def _memory(needed: Memory, there: int) -> Iterator[str]:
    yield _line("memory", f"about {in_bytes(needed.total)} of {in_bytes(there)}" + " a process" * (world() > 1))
    for name, size in vars(needed).items():
        yield _line("", f"{name:<12}{in_bytes(size):>9}")
    if needed.total > there:
        yield _line("", "WARNING: that may be more than there is; lower --loop.batch-tokens, raise --loop.accumulate, "
                    "or use more processes")


def _disk(trainer: Trainer, out: Path) -> Iterator[str]:
    """States on disk hold weights and moments; one more than are kept while the newest is written; then the model."""
    whole = state_memory(trainer.system)
    state, keep = whole.weights + whole.moments, trainer.loop.keep
    models = whole.weights * (1 if trainer.validation is None else 2)
    total = (keep + 1) * state + models
    folder = next(place for place in [out, *out.absolute().parents] if place.exists())
    free = shutil.disk_usage(folder).free
    yield _line("disk", f"about {in_bytes(total)} of {in_bytes(free)} free: states {in_bytes(state)} x {keep} + 1 "
                f"being written, models {in_bytes(models)}")
    if total > free:
        yield _line("", "WARNING: that is more than is free; lower --loop.keep, or give another --out")


@dataclass(frozen=True)
class _Speed:
    """Of the steps on the clock: seconds and real tokens of one, all processes together."""

    seconds: float
    tokens: float


def _measured(trainer: Trainer, batches: list[Batch], rest: Iterator[list[Batch]]) -> _Speed:
    tokens, began = 0, 0.0
    for number in range(WARM + MEASURED):
        if number == WARM:
            _finish(trainer.device)
            tokens, began = 0, time.perf_counter()
        tokens += sum(batch.tokens for batch in batches)
        trainer.train_step(counted_together(batches))
        batches = next(rest)
    _finish(trainer.device)
    seconds = (time.perf_counter() - began) / MEASURED
    summed = sum_over_ranks({"tokens": torch.tensor(tokens / MEASURED, dtype=torch.float64)})
    return _Speed(seconds, summed["tokens"].item())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _expected(trainer: Trainer, first: Work, speed: _Speed) -> Iterator[str]:
    """Work and time of the whole run, by the steps that were tried."""
    best = peak(trainer.device, trainer.bfloat16)
    flops = first.flops / max(first.tokens, 1) * speed.tokens
    left = trainer.loop.steps - trainer.step
    yield _line("work", f"{speed.tokens:,.0f} tokens a step, with every task's sequences, and "
                f"{in_flop(flops)}; {in_flop(flops * trainer.loop.steps)} in all")
    yield _line("speed", f"{speed.tokens / speed.seconds:,.0f} tokens/s, {speed.seconds:.3g} s a step, "
                f"{flops / speed.seconds / world() / best.flops_per_second:.1%} of {in_flop(best.flops_per_second)}/s "
                f"({best.source})")
    libraries = "" if trainer.device.type == "cuda" else ", with Python and its libraries"
    yield _line("held", f"{in_bytes(memory_in_use(trainer.device))} by this process in these steps{libraries}")
    yield _line("time", f"{timedelta(seconds=round(left * speed.seconds))} for {left:,} steps, by {MEASURED} steps "
                "just tried; states and validation come on top")


def in_flop(count: float) -> str:
    """Operations as people say them: `2.1 EFLOP`, `4.4 TFLOP`."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e6:,.1f} MFLOP"
