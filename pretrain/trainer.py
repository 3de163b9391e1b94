"""The training loop: one for every system.

    plan -> loader -> forward -> loss -> backward -> clip -> step -> after_step -> metrics -> checkpoint

Steps, not epochs. The state is model, optimizer, step and data position; dropout's generator is seeded by the step, so
that N + M steps equal N steps, a stop, and M more, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.checkpoint import load_state, newest_state, save_pretrained, save_state
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.loader import Loader
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.distributed import sum_over_ranks
from opt.objectives.term import Term, loss
from opt.progress import progress
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.system import Progress, System
from pretrain.metrics import Meter, MetricsFile
from pretrain.optim import adamw, learning_rate
from pretrain.pictures import save_picture


class Trainer:
    """One run of one system in `folder`; made anew, it goes on from the newest checkpoint there."""

    def __init__(self, system: System, reader: ShardReader, folder: Path, loop: LoopConfig, optim: OptimConfig) -> None:
        self.system, self.reader, self.folder, self.loop, self.optim = system, reader, folder, loop, optim
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bfloat16 = use_bfloat16(loop.precision, self.device)
        self.system.to(self.device).train()
        self.optimizer = adamw(system, optim)
        self.step, self.position = 0, 0
        self.stopping = False
        if (newest := newest_state(folder / "checkpoints")) is not None:
            self._load(newest)

    def run(self) -> None:
        """Train to the last step and write the model. Raises KeyboardInterrupt after saving when told to stop."""
        metrics, meter = MetricsFile(self.folder / "metrics.jsonl", self.step), Meter()
        loader = self._loader()
        with progress("training", self.loop.steps, self.step, "steps") as bar, self._stop_signals():
            for batch, position in loader:
                if self.step >= self.loop.steps:
                    break
                terms, total, norm = self.train_step(batch.to(self.device))
                self.step, self.position = self.step + 1, position
                meter.add(terms, total, batch.tokens)
                note, last = None, self.step == self.loop.steps
                if self.step % self.loop.log_every == 0 or last:
                    values = {"step": self.step, **meter.line(loader.waited), "gradient_norm": float(norm)}
                    note = self._log(values, metrics)
                bar.advance(1, note)
                if self.step % self.loop.save_every == 0 or last or self.stopping:
                    self._require_finite(total, norm, batch)
                    save_state(self.folder / "checkpoints", self.step, self._state(), self.loop.keep)
                    picture = self.folder / "pictures" / f"step-{self.step:08d}.png"
                    save_picture(self.system, batch.to(self.device), picture)
                if self.stopping:
                    raise KeyboardInterrupt
        save_pretrained(self.system, self.folder / "model")

    def train_step(self, batch: Batch) -> tuple[dict[str, Term], Tensor, Tensor]:
        """One optimizer step: the terms, the loss and the gradient norm, all still on the device."""
        torch.manual_seed(self.loop.seed * 1_000_003 + self.step)
        rate = learning_rate(self.step, self.loop.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = dataclasses.replace(batch, counts=sum_over_ranks(batch.counts))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            output = self.system(batch, Progress(self.step, self.step / self.loop.steps))
        total = loss(output.terms)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.system.parameters(), self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.system.after_step([output.carry])
        return output.terms, total, norm

    def plan(self) -> Plan:
        """The data order of this run: a pure function of seed, shards and system."""
        preparer = self.system.preparer()
        costs = preparer.cost(self.reader.lengths)
        return Plan(self.loop.seed, costs, self.loop.batch_tokens, preparer.tasks, self.reader.key_hash)

    def _loader(self) -> Loader:
        return Loader(self.reader, self.plan(), self.system.preparer(), self.position, workers=self.loop.workers,
                      pin_memory=self.device.type == "cuda")

    def _log(self, values: dict[str, Any], metrics: MetricsFile) -> str:
        metrics.seconds += values["seconds"]
        rate = learning_rate(self.step - 1, self.loop.steps, self.optim)
        metrics.append({**values, "learning_rate": rate, "seconds": round(metrics.seconds, 3)})
        return (f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s, "
                f"waiting {values['wait_share']:.0%}")

    def _require_finite(self, total: Tensor, norm: Tensor, batch: Batch) -> None:
        """Before a state is saved: raises UserError when training has run off, so that the state before it stays."""
        if not bool(torch.isfinite(total) & torch.isfinite(norm)):
            raise UserError(f"the loss is not finite at step {self.step}, with {', '.join(batch.keys[:8])} in the batch"
                            "; try a lower --optim.learning-rate or --loop.precision float32")

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.system.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": {"step": torch.tensor(self.step), "position": torch.tensor(self.position)},
        }

    def _load(self, path: Path) -> None:
        for group in self.optimizer.param_groups:  # a state to load into: zero moments where there are none yet
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self._state()
        load_state(path, state)
        self.system.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position = int(state["counters"]["step"]), int(state["counters"]["position"])

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C finish the step in flight and save it."""

        def stop(number: int, frame: Any) -> None:
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16. Raises UserError for an unknown precision."""
    if precision not in ("auto", "bfloat16", "float32"):
        raise UserError(f"unknown precision {precision!r}; choose auto, bfloat16 or float32")
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())
