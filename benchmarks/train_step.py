"""Our training step against the same model written with transformers, in one run: real tokens a second.

    python benchmarks/train_step.py [--quick] [--tokens 8192] [--batches 12] [--repeats 2] [--threads 2]

All sides train `opt.small` with 30,522 words, alignment included, on made-up spoken descriptions (narratives.py):

    plain    transformers' BERT padded to the longest, float32, logits at all positions, one objective a step, batches
             in random order, each modality alone in an encoder run of its own, AdamW as torch has it by default
    tuned    the same in bfloat16 autocast, with logits at targets only, batches of like lengths (our plan's) and fused
             AdamW
    ours     pretrain.trainer

and, without --quick, what lies between them, one change after another. baselines.py says what the baselines are given
besides.

A real token is a token of a sequence that an objective needs, counted once, or a token that a decoder writes; padding
is none. All sides count `Batch.tokens` of batches that one preparer made before any padding. Where there is one
objective a step, the six come equally often and count by opt.small's shares, as its rows draw them; so all sides do the
same for a sample. Sides take turns, a step on each of their batches at a time; a step lasts from the batch to zeroed
gradients, and each batch counts with the median of its repeats. Batches are prepared beforehand (benchmarks/loader.py
times that). Each side has the better of 1 and `threads` threads, and BERT in bfloat16 the better of transformers' two
kernels of attention: eager is the faster one on CPUs, sdpa its usual one (`over_tuned_sdpa`, without --quick).

`mfu`: operations of our steps (pretrain.estimate) over what the processor can do: on a GPU those of `opt.paper` over
the maker's figure, on a CPU those of `opt.small` over a measured matrix product. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import Padded, Runs, regroup
from narratives import write_narratives
from paper_step import vocabulary
from turns import Side, over, plain_step, take_turns

from opt.data.batch import Batch
from opt.data.loader import Loader
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.recipe import LoopConfig
from opt.systems.opt import OPT, paper, small
from opt.systems.system import Preparer, Preset
from pretrain.estimate import peak, work
from pretrain.optim import adamw
from pretrain.run import facts
from pretrain.trainer import Trainer

SAMPLES, WORDS = 512, 30_522


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples and words, tokens of a batch, and how many batches each side gets."""

    reader: ShardReader
    words: Tokenizer
    tokens: int
    batches: int

    def model(self, preset: Preset, kind: type[OPT] = OPT, **rest: Any) -> OPT:
        """A new model, the same weights for the same sizes."""
        torch.manual_seed(0)
        return kind(preset.model, self.words, facts(self.reader.manifest), **rest)

    def trainer(self, preset: Preset, folder: Path) -> Trainer:
        """Our trainer of a preset."""
        loop = LoopConfig(steps=preset.loop.steps, batch_tokens=self.tokens, workers=0)
        return Trainer(self.model(preset), self.reader, folder, loop, preset.optim)

    def of(self, preparer: Preparer, alike: bool) -> list[Batch]:
        """The first batches of an epoch. alike: of samples that cost alike, as the trainer's; else of any."""
        costs = preparer.cost(self.reader.lengths)
        if not alike:
            costs = np.full(len(costs), round(costs.mean()))
        plan = Plan(0, costs, self.tokens, preparer.tasks, self.reader.key_hash)
        return [batch for (batch,), _ in islice(Loader(self.reader, plan, preparer, workers=0), self.batches)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="plain, tuned and ours alone, 2 repeats of 6 batches")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch with nothing left out")
    parser.add_argument("--batches", type=int, default=12, help="different batches of each side; a multiple of 6")
    parser.add_argument("--repeats", type=int, default=2, help="steps on each batch")
    parser.add_argument("--threads", type=int, default=2, help="most threads of a side")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.repeats = 6, 2
    with tempfile.TemporaryDirectory() as name:
        data = Data(write_narratives(Path(name), SAMPLES), vocabulary(Path(name), WORDS), options.tokens,
                    options.batches)
        print(json.dumps(measure(data, Path(name), options)))


def measure(data: Data, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the JSON line says."""
    trainer = data.trainer(small(), folder / "small")
    sides = all_sides(data, trainer)
    if options.quick:
        sides = {name: sides[name] for name in ("plain", "tuned", "ours")}
    began = time.perf_counter()
    take_turns(sides, options.repeats, options.threads, trainer.device)
    plain, tuned, ours = sides["plain"], sides["tuned"], sides["ours"]
    device = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU"
    usual = {} if options.quick else {"over_tuned_sdpa": over(ours, sides["tuned, sdpa"])}
    return {
        "speedup": over(ours, plain), "over_tuned": over(ours, tuned), **usual,
        **utilisation(data, folder, trainer, ours),
        "speedup_by_samples": over(ours, plain, "samples"), "over_tuned_by_samples": over(ours, tuned, "samples"),
        "speedup_by_cpu_seconds": over(ours, plain, clock="cpu"),
        "over_tuned_by_cpu_seconds": over(ours, tuned, clock="cpu"),
        "sides": {name: side.figures() for name, side in sides.items()}, "device": device,
        "torch": torch.__version__, "transformers": transformers.__version__, "vocabulary": data.words.size,
        "batch_tokens": data.tokens, "batches": options.batches, "repeats": options.repeats,
        "seconds": round(time.perf_counter() - began, 1),
    }


def all_sides(data: Data, trainer: Trainer) -> dict[str, Side]:
    """Plain, then one change more on each side, down to ours."""
    mixed, device = small(), trainer.device
    steps = dataclasses.replace(mixed, model=dataclasses.replace(mixed.model, mixing="steps"))
    everywhere = data.model(steps, Padded, everywhere=True).to(device)
    at_targets = data.model(steps, Padded, everywhere=False).to(device)
    runs = data.model(mixed, Runs).to(device)
    rate, shares = mixed.optim.learning_rate, dataclasses.asdict(mixed.model.shares)

    def side(change: str, model: OPT, bfloat16: bool, fused: bool, batches: list[Batch],
             attention: Sequence[str] = ("sdpa", "eager")) -> Side:
        optimizer = adamw(model, mixed.optim) if fused else torch.optim.AdamW(model.parameters(), lr=rate)
        kernels = {"": plain_step(model, optimizer, bfloat16, device)}
        if isinstance(model, Padded):
            kernels = {kernel: plain_step(model, optimizer, bfloat16, device, partial(model.use, kernel))
                       for kernel in attention}
        weights = [shares[task] if (task := only_task(batch)) else 1.0 for batch in batches]
        return Side(change, kernels, batches, amounts(batches), weights, size(model))

    order = everywhere.preparer()
    random, alike = ([regroup(batch, padded=True).to(device) for batch in data.of(order, flag)]
                     for flag in (False, True))
    rows = data.of(runs.preparer(), alike=True)
    ours = [batch.to(device) for batch in data.of(trainer.preparer, alike=True)]
    return {
        "plain": side("", everywhere, False, False, random, ("sdpa",)),
        "bfloat16": side("matrix products in bfloat16", everywhere, True, False, random),
        "targets": side("logits at targets only", at_targets, True, False, random),
        "sorted": side("batches of like lengths", at_targets, True, False, alike),
        "tuned": side("fused AdamW", at_targets, True, True, alike),
        "tuned, sdpa": side("only transformers' usual kernel", at_targets, True, True, alike, ("sdpa",)),
        "rows": side("all objectives a step, a row each", at_targets, True, True,
                     [regroup(batch, padded=True).to(device) for batch in rows]),
        "packed": side("our blocks on packed tokens", runs, True, True,
                       [regroup(batch, padded=False).to(device) for batch in rows]),
        "ours": Side("one encoder run, equal sequences once", {"": lambda batch: trainer.train_step([batch])}, ours,
                     amounts(ours), [1.0] * len(ours), size(trainer.system)),
    }


def amounts(batches: list[Batch]) -> dict[str, list[int]]:
    """Real tokens and samples of each batch."""
    return {"tokens": [batch.tokens for batch in batches], "samples": [len(batch.keys) for batch in batches]}


def size(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def only_task(batch: Batch) -> str | None:
    """The objective of a batch whose rows all have the same; None where they differ."""
    asked = {"mlm": "mlm", "regions": "mvm", "frames": "mam", "match": "match", "text": "dtr", "codes": "dir"}
    tasks = [task for name, task in asked.items() if float(batch.counts[name]) > 0]
    return tasks[0] if len(tasks) == 1 else None


def utilisation(data: Data, folder: Path, trainer: Trainer, ours: Side) -> dict[str, Any]:
    """Operations of our steps over the processor's peak: opt.small as timed; on a GPU opt.paper, steps unwatched."""
    if trainer.device.type == "cpu":
        torch.set_num_threads(ours.threads)
    best = max((peak(trainer.device, trainer.bfloat16) for _ in range(5)), key=lambda found: found.flops_per_second)

    def operations(trainer: Trainer, batches: Sequence[Batch]) -> float:
        return float(np.mean([work(trainer.system, batch, trainer.bfloat16, trainer.device).flops
                              for batch in batches]))

    share = operations(trainer, ours.batches) / ours.seconds() / best.flops_per_second
    figures = {"mfu": round(share, 4), "mfu_of": "opt.small", "peak_tflops": round(best.flops_per_second / 1e12, 3),
               "peak_source": best.source}
    if trainer.device.type == "cpu":
        return figures
    data = dataclasses.replace(data, tokens=paper().loop.batch_tokens)
    large = data.trainer(paper(), folder / "paper")
    batches = [batch.to(large.device) for batch in data.of(large.preparer, alike=True)]
    for wanted in (2, 5):  # the first rounds compile
        began = time.perf_counter()
        for batch in batches * wanted:
            large.train_step([batch])
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(batches) / wanted
    share = operations(large, batches) / seconds / best.flops_per_second
    rate = float(np.mean([batch.tokens for batch in batches])) / seconds
    return {**figures, "mfu": round(share, 4), "mfu_of": "opt.paper", "small_mfu": figures["mfu"],
            "paper_tokens_per_second": round(rate), "paper_step_seconds": round(seconds, 4)}


if __name__ == "__main__":
    main()
