"""The training loop: one for every system, in one process or many.

    plan -> loader -> micro-batches -> forward -> loss -> backward -> sum over processes -> clip -> step -> after_step
                                                        \\-> every n steps: metrics, validation, state

Steps, not epochs. The state is model, optimizer, counters and the position in the data; every step seeds its own
randomness, so that N + M steps equal N steps, a stop, and M more, bit for bit on a CPU. Nothing in a step waits for the
device: counts are summed over processes on the CPU, and a step that must be skipped is skipped on the device.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from opt.checkpoint import save_pretrained
from opt.config import RunAgain, UserError
from opt.data.batch import Batch
from opt.data.capacity import Filled
from opt.data.loader import Loader
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.distributed import rank, world
from opt.files import make_folder, replace_folder
from opt.history import History, so_far
from opt.nn.compiled import compile_blocks
from opt.objectives.term import Term, loss
from opt.progress import Progress as Bar
from opt.progress import progress
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.system import Preparer, Progress, System
from pretrain.estimate import peak, work
from pretrain.guard import Guard
from pretrain.metrics import Meter, MetricsFile
from pretrain.optim import adamw, learning_rate
from pretrain.parallel import Parallel, counted_together, how_many, of_first, say, whole
from pretrain.pictures import save_picture
from pretrain.profile import Profile
from pretrain.state import States, load_state, newest_state
from pretrain.validation import Best, Validation


@dataclass(frozen=True)
class Step:
    """What a step was, still on the device. terms, losses: one for each micro-batch, this process's share. norm: of the
    whole gradient; kept (bool): False where loss or gradient was not finite and nothing moved."""

    terms: list[dict[str, Term]]
    losses: list[Tensor]
    norm: Tensor
    kept: Tensor


class _Told(BaseException):
    """A signal came while the loop waited for data."""


class Trainer:
    """One run of one system in `folder`; made anew, it goes on from the newest state there.

    proportions: how often rows come from each corpus of `reader`. held_out: what is validated on. history: what the
    model says of its training, this run being the last stage.
    """

    def __init__(
        self, system: System, reader: ShardReader, folder: Path, loop: LoopConfig, optim: OptimConfig,
        proportions: tuple[float, ...] = (), held_out: ShardReader | None = None,
        device: torch.device | None = None, history: History = (),
    ) -> None:
        self.system, self.reader, self.folder, self.loop, self.optim = system, reader, folder, loop, optim
        self.proportions, self.history = proportions, history
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bfloat16 = use_bfloat16(loop.precision, self.device)
        self.preparer: Preparer = system.preparer()
        system.to(self.device).train()
        if loop.compile and self.device.type == "cuda":
            compile_blocks(system)
            self.preparer = Filled(self.preparer, loop.batch_tokens // (world() * loop.accumulate))
        self.parallel = Parallel(system, loop, self.device)
        self.optimizer = adamw(system, optim)
        self.states = States(folder / "checkpoints", loop.keep)
        self.guard = Guard(folder / "skipped.jsonl", loop.max_skipped)
        self.validation = None if held_out is None else Validation(held_out, self.preparer, loop)
        self.best = Best()
        self.step, self.position = 0, 0
        self.stopped_by: int | None = None
        self.waiting = False
        if (newest := of_first(lambda: newest_state(folder / "checkpoints"))) is not None:
            self._load(newest)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its last step, or to its early end."""
        return self.step >= self.loop.steps or 0 < self.loop.patience <= self.best.since

    def run(self, profile: Profile | None = None, tensorboard: Any = None) -> None:
        """Train to the end and write the model.

        Raises RunAgain (SIGTERM, SIGUSR1), KeyboardInterrupt (Ctrl-C), or what the loader raises, after the step in
        flight is done and saved.
        """
        make_folder(self.folder)
        self.guard.forget_after(self.step)
        metrics, meter = MetricsFile(self.folder / "metrics.jsonl", self.step, tensorboard), Meter()
        loader = self.loader()
        with ExitStack() as stack:
            bar = progress("training", self.loop.steps, self.step, "steps") if rank() == 0 else None
            if bar is not None:
                stack.enter_context(bar)
            profiler = stack.enter_context(profile) if profile is not None else None
            stack.enter_context(self._stop_signals())
            steps = iter(loader)
            while not self.finished:
                batches, position = self._next(steps)
                if meter.work is None:
                    self._measure(batches[0], meter)
                batches = counted_together(batches)
                self._note(self.train_step(batches), batches, meter)
                self.step, self.position = self.step + 1, position
                self._log_and_save(batches[0], meter, metrics, loader.waited, bar)
                if profiler is not None:
                    profiler.step()
            self.states.join()
            self._write_model("model")

    def train_step(self, batches: list[Batch]) -> Step:
        """One optimizer step on this process's micro-batches, whose counts are `counted_together`."""
        rate = learning_rate(self.step, self.loop.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms, losses, carries = [], [], []
        for number, batch in enumerate(batches):
            torch.manual_seed(self._seed(number))
            with self.parallel.accumulating(last=number == len(batches) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                    output = self.parallel.module(batch.to(self.device), self.progress)
                share = loss(output.terms)
                share.backward()
            terms.append(output.terms)
            losses.append(share.detach())
            carries.append(output.carry)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.system.parameters(), self.optim.clip))
        kept = self._move(torch.stack(losses).sum(), norm)
        self.system.after_step(carries, kept)
        return Step(terms, losses, norm, kept)

    def _move(self, total: Tensor, norm: Tensor) -> Tensor:
        """Let the optimizer step, unless loss or gradient is not finite on any process: decided on the device."""
        if world() > 1:
            dist.all_reduce(total)
        kept = torch.isfinite(total) & torch.isfinite(norm)
        self.optimizer.found_inf = (~kept).float()  # type: ignore[attr-defined]  # how fused AdamW is told to skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return kept

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(self.step, self.step / self.loop.steps)

    def plan(self) -> Plan:
        """The data order of this run: a pure function of seed, shards and system."""
        costs = self.preparer.cost(self.reader.lengths)
        return Plan(self.loop.seed, costs, self.loop.batch_tokens, self.preparer.tasks, self.reader.key_hash,
                    self.loop.multiple, self.reader.sizes, self.proportions or None)

    def loader(self) -> Loader:
        """This process's micro-batches, from where the run is."""
        return Loader(self.reader, self.plan(), self.preparer, self.position, rank(), world(), self.loop.accumulate,
                      self.loop.workers, pin_memory=self.device.type == "cuda")

    def _next(self, steps: Iterator[tuple[list[Batch], int]]) -> tuple[list[Batch], int]:
        """The next step's micro-batches; where a process is told to stop or cannot read, all save what was learned."""
        batches: list[Batch] = []
        position, failure = 0, None
        try:
            self.waiting = True  # a signal ends it: data may be long in coming, and nothing is in flight
            batches, position = next(steps)
            self.waiting = False
        except _Told:
            pass
        except Exception as error:
            failure = error
        self.waiting = False
        asked = self.stopped_by is not None  # then a reader may well have failed
        told = how_many(failed=failure is not None and not asked, stopping=asked)
        if any(told.values()) and self.step > 0:
            self.states.save(self.step, self._state)
            self.states.join()
            say(f"step {self.step:,} of {self.loop.steps:,} is saved")
        if told["failed"]:
            raise failure or SystemExit(2)  # the process that cannot read says why
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        if told["stopping"]:
            raise RunAgain(f"stopped as asked after step {self.step:,} of {self.loop.steps:,}")
        return batches, position

    def _measure(self, batch: Batch, meter: Meter) -> None:
        """What a micro-batch asks for, beside what the processor can do: for the share of peak in the metrics."""
        began = time.perf_counter()
        meter.measure(work(self.system, batch, self.bfloat16, self.device), peak(self.device, self.bfloat16))
        meter.pause(time.perf_counter() - began)

    def _note(self, step: Step, batches: list[Batch], meter: Meter) -> None:
        for terms, share, batch in zip(step.terms, step.losses, batches, strict=True):
            meter.add(terms, share, batch)
        meter.step(step.kept, step.norm)
        self.guard.watch(self.step + 1, [key for batch in batches for key in batch.keys], step.kept)

    def _log_and_save(
        self, batch: Batch, meter: Meter, metrics: MetricsFile, waited: float, bar: Bar | None
    ) -> None:
        """What is due after a step: a line of metrics, a validation, a state."""
        last, note = self.step >= self.loop.steps, None
        log, validate, save = (last or self.step % every == 0 for every in (
            self.loop.log_every, self.loop.validate_every or self.loop.save_every, self.loop.save_every))
        if log or validate or save:
            self._review()
        if log:
            rate = learning_rate(self.step - 1, self.loop.steps, self.optim)
            note = metrics.append({"step": self.step, **meter.line(waited), "learning_rate": rate})
        if validate and self.validation is not None:
            note = self._validate(self.validation, metrics, meter)
        if save or self.finished:
            self._save(batch)
        if bar is not None:
            bar.advance(1, note)

    def _review(self) -> None:
        """Name skipped steps; where too many end the run, leave the model as it stands, to begin another run with."""
        try:
            self.guard.review()
        except UserError:
            self._write_model("model")
            raise

    def _validate(self, validation: Validation, metrics: MetricsFile, meter: Meter) -> str:
        """Validate, keep the best model, and say how it went."""
        began = time.perf_counter()
        self.states.join()  # its loader forks, and nothing may be under way in threads then
        values = validation.run(self.system, self.device, self.bfloat16, self.progress)
        if self.best.take(values["loss"], self.step):
            self._write_model("best")
        meter.pause(time.perf_counter() - began)
        metrics.append({"step": self.step, "validation": values})
        return f"validation {values['loss']:.3f}, best {self.best.loss:.3f} at step {self.best.step}"

    def _save(self, batch: Batch) -> None:
        self.states.save(self.step, self._state)
        if rank() == 0 and not self.parallel.sharded:
            save_picture(self.system, batch.to(self.device), self.folder / "pictures" / f"step-{self.step:08d}.png")

    def _write_model(self, name: str) -> None:
        """The model for use, as it stands, in a subfolder of the run."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = cast(dict[str, Tensor], get_model_state_dict(self.system, options=options))
        if rank() == 0:
            best = f"; held-out loss {self.best.loss:.4f} at step {self.best.step:,}" if self.best.step else ""
            unfinished = self.folder / f".{name}.tmp"
            save_pretrained(
                self.system, unfinished, weights, f": {self.step:,} of {self.loop.steps:,} steps of at most "
                f"{self.loop.batch_tokens:,} tokens on data {self.reader.fingerprint[:16]}{best}",
                so_far(self.history, self.step, self.position),
            )
            replace_folder(unfinished, self.folder / name)

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on; names are the same in one process and in many."""
        model, optimizer = get_state_dict(self.system, self.optimizer)
        counters = {"step": self.step, "position": self.position, "skipped": self.guard.in_a_row,
                    "best_step": self.best.step, "since_best": self.best.since}
        numbers = {name: torch.tensor(value) for name, value in counters.items()}
        best_loss = torch.tensor(self.best.loss, dtype=torch.float64)
        return {"model": model, "optimizer": optimizer, "counters": {**numbers, "best_loss": best_loss}}

    def _load(self, path: Path) -> None:
        state = self._state()
        load_state(path, state)
        set_state_dict(self.system, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        counters = {name: value.item() for name, value in state["counters"].items()}
        self.step, self.position, self.guard.in_a_row = counters["step"], counters["position"], counters["skipped"]
        self.best = Best(counters["best_loss"], counters["best_step"], counters["since_best"])
        self.states.step = self.step

    def _seed(self, micro_batch: int) -> int:
        """Of what is drawn in a micro-batch of the step at hand, on this process."""
        source = np.random.SeedSequence((self.loop.seed, self.step, rank(), micro_batch))
        return int(source.generate_state(1, np.uint64)[0] >> np.uint64(1))

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 (what job schedulers send) and Ctrl-C let the step in flight end and save it."""

        def stop(number: int, frame: Any) -> None:
            self.stopped_by = number
            if self.waiting:
                self.waiting = False
                raise _Told

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: where the processor multiplies it fast, unless told."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())
