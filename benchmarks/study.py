"""Studies: variants of a model, or several systems, trained on spoken scenes for the same CPU time, several seeds each.

    scenes, shards, CPU time of a step (once) -> one folder a run: trained, judged -> one record a run -> table

A run that is done is not done again and one that was stopped goes on, so the same command may be given again at any
time; studies that train the same variant share its run. Every run uses one thread; `workers` are under way at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt import cli
from opt.checkpoint import from_pretrained
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.files import write_atomic
from opt.lock import alone
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import tiny
from opt.systems.system import System, build
from pretrain.run import facts
from pretrain.trainer import Trainer

TRAIN, TEST, SEED = 3000, 1000, 11
MODEL = tiny().model
OPTIM = OptimConfig(learning_rate=6e-4)
BATCH_TOKENS = 4096
MEASURED_STEPS, WARM_UP_STEPS = 16, 4
CHECKPOINTS = 4
"""States kept of each run, evenly spaced; the last one is its end."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed. `minutes` of CPU decide its steps; 0 judges the untrained model.

    data: subfolder of the shards, for variants that are data.
    """

    variant: str
    model: Any
    seed: int
    minutes: float
    out: Path
    data: str = ""
    system: str = "opt"
    batch_tokens: int = BATCH_TOKENS
    optim: OptimConfig = OPTIM

    @property
    def folder(self) -> Path:
        return self.out / "runs" / f"{self.variant}-{self.seed}-{self.minutes:g}min"

    def shards(self, split: str) -> Path:
        return self.out / "shards" / self.data / split


Judge = Callable[[Run, System], dict[str, Any]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all studies share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="scenes, shards, runs, figures")
    parser.add_argument("--minutes", type=float, default=4.0, help="CPU-minutes of training a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    return parser


def make_data(out: Path) -> None:
    """Scenes and shards, by the verbs that a user would type; what is there already is left."""
    do("scenes", "--out", out / "scenes", "--train", TRAIN, "--val", 0, "--test", TEST, "--seed", SEED)
    for split in ("train", "test"):
        do("extract", "localized_narratives", out / "scenes", "--split", split, "--out", out / "shards" / split,
            "--frames-per-second", 8)


def do(*words: object) -> None:
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)


def carry_out(study: str, runs: list[Run], judge: Judge, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Records of all runs by variant, in order of seeds; those that are missing are made, `workers` at once."""
    torch.set_num_threads(1)
    measure_steps(runs)
    missing = [run for run in runs if not (run.folder / f"{study}.json").exists()]
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:  # each its own memory
        waiting = {pool.submit(_make, study, run, judge): run for run in missing}
        for number, done in enumerate(as_completed(waiting), start=1):
            done.result()
            print(f"{waiting[done].folder.name}: done, {number} of {len(missing)}", flush=True)
    records: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        records.setdefault(run.variant, []).append(json.loads((run.folder / f"{study}.json").read_text()))
    return records


def _make(study: str, run: Run, judge: Judge) -> None:
    torch.set_num_threads(1)
    with alone(run.folder):
        if not (run.folder / "trained.json").exists():
            reader = ShardReader(run.shards("train"))
            trained = _train(run, reader, Tokenizer.train(reader.captions(), 2000))
            write_atomic(run.folder / "trained.json", json.dumps(trained).encode())
        record = {"variant": run.variant, "seed": run.seed, "minutes": run.minutes, "folder": run.folder.name,
                  **json.loads((run.folder / "trained.json").read_text()),
                  **judge(run, from_pretrained(run.folder / "model"))}
        write_atomic(run.folder / f"{study}.json", json.dumps(record).encode())


def measure_steps(runs: list[Run]) -> None:
    """Write OUT/cpu_seconds.json: CPU-seconds of a step of each variant, so that CPU-minutes become steps.

    Steps of all variants take turns, because a busy machine makes every step slower: variants stay comparable. Those
    of a later call are measured beside one that is known, and scaled to what that took at first.
    """
    path = runs[0].out / "cpu_seconds.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    new = {run.variant: run for run in runs if run.variant not in known and run.minutes}
    if new:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # so much memory is not needed again
            known |= pool.submit(_measured, runs, new, known).result()
        write_atomic(path, json.dumps(known).encode())


def _measured(runs: list[Run], new: dict[str, Run], known: dict[str, float]) -> dict[str, float]:
    """CPU-seconds of a step of the new variants."""
    torch.set_num_threads(1)
    readers = {run.shards("train"): ShardReader(run.shards("train")) for run in runs}
    tokenizer = Tokenizer.train(readers[runs[0].shards("train")].captions(), 2000)
    with tempfile.TemporaryDirectory() as folder:
        anchor = next((run for run in runs if run.variant in known), None)
        beside = ({anchor.variant: anchor} if anchor else {}) | new
        steppers = {name: _steps(run, readers[run.shards("train")], tokenizer, Path(folder))
                    for name, run in beside.items()}
        rounds = [{name: next(stepper) for name, stepper in steppers.items()} for _ in range(MEASURED_STEPS)]
    seconds = {name: float(np.mean([round[name] for round in rounds[WARM_UP_STEPS:]])) for name in steppers}
    scale = known[anchor.variant] / seconds[anchor.variant] if anchor else 1.0
    return {name: round(seconds[name] * scale, 4) for name in new}


def _steps(run: Run, reader: ShardReader, tokenizer: Tokenizer, folder: Path) -> Iterator[float]:
    """CPU-seconds of one training step after another."""
    trainer = _trainer(run, reader, tokenizer, folder, 10**6)
    batches = iter(trainer.loader())
    while True:
        began = time.process_time()
        trainer.train_step(next(batches)[0])
        trainer.step += 1
        yield time.process_time() - began


def _train(run: Run, reader: ShardReader, tokenizer: Tokenizer) -> dict[str, Any]:
    """Train for the run's CPU time, in steps as `measure_steps` found them."""
    a_step = json.loads((run.out / "cpu_seconds.json").read_text()).get(run.variant)
    steps = int(60 * run.minutes / a_step) if run.minutes else 1
    trainer = _trainer(run, reader, tokenizer, run.folder, steps)
    began, before = time.process_time(), trainer.step
    trainer.run()
    spent = time.process_time() - began
    return {"steps": steps, "cpu_seconds_a_step": a_step, "cpu_seconds": round(spent, 1) if before == 0 else None,
            "losses": _last_losses(run.folder)}


def _trainer(run: Run, reader: ShardReader, tokenizer: Tokenizer, folder: Path, steps: int) -> Trainer:
    torch.manual_seed(run.seed)
    system = build(run.system, run.model, tokenizer, facts(reader.manifest))
    loop = LoopConfig(steps=steps, seed=run.seed, batch_tokens=run.batch_tokens, workers=0, keep=CHECKPOINTS,
                      save_every=-(-steps // CHECKPOINTS))
    optim = run.optim if run.minutes else dataclasses.replace(run.optim, learning_rate=1e-12)
    return Trainer(system, reader, folder, loop, optim)


def _last_losses(folder: Path) -> Mapping[str, float]:
    """Mean of each term over the last tenth of the logged steps."""
    lines = [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-max(1, len(lines) // 10) :]
    names = dict.fromkeys(name for line in last for name in line)
    return {name: round(float(np.mean([line[name] for line in last if name in line])), 4) for name in names}
