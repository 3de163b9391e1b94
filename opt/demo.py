"""`opt demo`: the whole line on spoken scenes, as a pipeline of verbs, from nothing to the report.

    scenes -> extract -> pretrain -> eval retrieval | transcribe | caption | text-to-image | classify -> report

Every stage is the verb that a user would type, printed before it runs. Stopped anywhere, the same command goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from opt import cli
from opt.config import RunAgain, UserError
from opt.files import write_atomic


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is. The defaults take about a quarter of an hour on two cores."""

    out: Path = Path("runs/demo")
    train: int = 3000
    """Scenes to learn from."""
    test: int = 200
    """Held-out scenes to evaluate on."""
    steps: int = 1400
    """Steps of pretraining."""
    batch_tokens: int = 8192
    workers: int = 2
    """Processes that draw, speak and extract."""
    seed: int = 1
    dry_run: bool = False
    """Print the commands and stop."""


def demo(config: DemoConfig) -> None:
    """Draw and speak scenes, extract features, pretrain OPT, evaluate it, write the report.

    Example: opt demo --out runs/demo
    """
    config.out.mkdir(parents=True, exist_ok=True)
    spent = config.out / "seconds.json"  # a demo that goes on adds to what it has spent
    seconds: dict[str, float] = json.loads(spent.read_text()) if spent.exists() else {}
    for name, argv in stages(config):
        print(f"\n$ opt {shlex.join(argv)}", flush=True)
        if config.dry_run:
            continue
        began = time.perf_counter()
        status = cli.main(argv)
        if status == os.EX_TEMPFAIL:
            raise RunAgain(f"stage {name!r} was stopped as asked")
        if status:
            raise UserError(f"stage {name!r} ended with status {status}; mend what it says, run the demo again")
        seconds[name] = seconds.get(name, 0.0) + round(time.perf_counter() - began, 1)
        seconds["total"] = round(sum(value for key, value in seconds.items() if key != "total"), 1)
        write_atomic(spent, json.dumps(seconds).encode())


def stages(config: DemoConfig) -> list[tuple[str, list[str]]]:
    """The command lines in order, each under its stage's name."""
    out, workers = config.out, str(config.workers)
    raw, train, test = str(out / "scenes"), str(out / "shards" / "train"), str(out / "shards" / "test")
    labels = [f"{raw}/{split}_scenes.jsonl" for split in ("train", "test")]
    evaluate = [str(out / "model"), test, "--out", str(out / "results")]
    return [
        ("scenes", ["scenes", "--out", raw, "--train", str(config.train), "--val", "0", "--test", str(config.test),
                    "--seed", str(config.seed), "--workers", workers]),
        *[("extract", ["extract", "localized_narratives", raw, "--split", split, "--out", folder, "--workers", workers,
                      "--frames-per-second", "8"])
          for split, folder in (("train", train), ("test", test))],
        ("pretrain", ["pretrain", "opt.tiny", "--shards", train, "--out", str(out), "--loop.steps", str(config.steps),
                      "--loop.batch-tokens", str(config.batch_tokens), "--loop.seed", str(config.seed)]),
        ("evaluate", ["eval", "retrieval", *evaluate]),
        ("evaluate", ["eval", "transcribe", *evaluate]),
        ("evaluate", ["eval", "caption", *evaluate, "--labels", labels[1]]),
        ("evaluate", ["eval", "text-to-image", *evaluate]),
        ("evaluate", ["eval", "classify", *evaluate, "--train-shards", train, "--labels", *labels]),
        ("report", ["report", str(out)]),
    ]
