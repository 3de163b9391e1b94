"""CapFilt on spoken scenes of which 40 % have the captions of other pictures: what it removes, and what that is worth.

    python benchmarks/capfilt.py [--shards runs/demo/shards] [--minutes 4.5] [--out runs/capfilt] [--quick]

    shards, a tenth aside (clean), captions of the rest swapped (noisy) --pretrain on both--> before
    before --tuned on clean: language alone--> captioner      before --tuned on clean: contrast, matching--> filter
    noisy --shards caption--> --shards filter--> filtered     filtered, clean --pretrain anew--> after

`before` and `after` take as many steps of as many tokens, `--minutes` of CPU each; captioner and filter a fifth of that
each. Both are judged on the test shards. Every stage is the verb that a user would type, and one that is done is not
done again. Prints one JSON line, the same as OUT/capfilt.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import do

from feature_extract.capfilt import SYNTHETIC
from opt.data.manifest import shard_name, write_manifest
from opt.data.pixels import Sight
from opt.data.record import Record
from opt.data.shards import ShardReader, ShardWriter
from opt.data.tokenizer import Tokenizer
from opt.files import write_atomic
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.blip import tiny
from opt.systems.shared.config import Sizes
from opt.systems.system import build
from pretrain.run import facts
from pretrain.trainer import Trainer

SWAPPED, CLEAN, SEED = 0.4, 0.1, 0
BATCH_TOKENS, RATE, TUNING_RATE = 4096, 1e-3, 2e-4
TUNING = 0.2
"""Of the steps of pretraining, for captioner and filter each."""
SIZES = Sizes(width=128, layers=3, heads=4, inner=512)
MODEL = dataclasses.replace(tiny().model, sight=Sight(size=64, patch=16), image=SIZES, text=SIZES, ring_rows=512)
"""Smaller than `blip.tiny`, so that minutes are thousands of steps; the ring holds less than an epoch."""
OPTIONS = ["--model.sight.patch", MODEL.sight.patch, "--model.ring-rows", MODEL.ring_rows,
           *(word for part in ("image", "text") for name, value in vars(SIZES).items()
             for word in (f"--model.{part}.{name}", value))]
SHARD = 500
MEASURED_STEPS, WARM_UP_STEPS = 12, 4
STAGES = ("clean", "noisy", "both", "captioned", "filtered", "after")
PARTS = {"captioner": (0, 0, 1), "filter": (1, 1, 0)}
"""Weights of contrast, matching and language that each is tuned by."""
SCORES = {"retrieval": ("text_to_image.r1", "image_to_text.r1"), "caption": ("cider_d", "word_f1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("runs/demo/shards"), help="folder with train and test")
    parser.add_argument("--minutes", type=float, default=4.5, help="CPU-minutes of each pretraining")
    parser.add_argument("--out", type=Path, default=Path("runs/capfilt"), help="shards, runs, figures")
    parser.add_argument("--quick", action="store_true", help="300 records and a few steps: whether all of it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    swapped = make_shards(ShardReader(given.shards / "train"), given.out, 300 if given.quick else None)
    shards = {name: given.out / "shards" / name for name in STAGES}
    do("shards", "merge", shards["both"], shards["noisy"], shards["clean"])
    a_step = 1.0 if given.quick else measured(shards["both"], given.out)
    steps = 8 if given.quick else int(60 * given.minutes / a_step)
    seconds = {"before": pretrain(given.out, "before", shards["both"], steps)}
    for name, weights in PARTS.items():
        seconds[name] = pretrain(given.out, name, shards["clean"], max(1, int(TUNING * steps)), weights)
    for name, source, model in (("captioned", "noisy", "captioner"), ("filtered", "captioned", "filter")):
        began = time.process_time()
        verb = "caption" if name == "captioned" else "filter"
        do("shards", verb, shards[source], "--model", given.out / model / "model", "--out", shards[name])
        seconds[name] = time.process_time() - began
    do("shards", "merge", shards["after"], shards["filtered"], shards["clean"])
    seconds["after"] = pretrain(given.out, "after", shards["after"], steps)
    figures: dict[str, Any] = {"minutes": given.minutes, "steps": steps, "cpu_seconds_a_step": round(a_step, 4),
                               "cpu_seconds": {name: round(spent, 1) for name, spent in seconds.items()}}
    figures |= removed(shards["captioned"], shards["filtered"], swapped)
    for name in ("before", "after"):
        figures[name] = judged(given.out / name, given.shards / "test")
    write_atomic(given.out / "capfilt.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(json.dumps(figures))


def make_shards(source: ShardReader, out: Path, limit: int | None) -> set[str]:
    """OUT/shards/clean and noisy, where they are not there yet; the keys of records with another's captions."""
    path = out / "swapped.json"
    if path.exists():
        return set(json.loads(path.read_text()))
    firsts = np.flatnonzero(source.column("narration") <= 0)[:limit]
    order = np.random.default_rng(SEED).permutation(firsts)
    clean, noisy = np.split(order, [round(CLEAN * len(order))])
    wrong = noisy[: round(SWAPPED * len(noisy))]  # in random order: each takes over what the next one tells
    teller = dict(zip(wrong.tolist(), np.roll(wrong, -1).tolist(), strict=True))
    for name, numbers in (("clean", np.sort(clean)), ("noisy", np.sort(noisy))):
        records = (dataclasses.replace(source.record(number, jpeg=True), narrations=source.record(
            teller.get(number, number)).narrations) for number in numbers.tolist())
        _write(out / "shards" / name, records, len(numbers), source)
    keys = sorted(source.sample(number).key for number in teller)
    write_atomic(path, json.dumps(keys).encode())
    return set(keys)


def _write(folder: Path, records: Any, count: int, source: ShardReader) -> None:
    """The records as a folder of shards like those they come from."""
    about, names = source.manifest, [shard_name(number) for number in range(-(-count // SHARD))]
    for name in names:
        with ShardWriter(folder, name, about.storage == "int8") as shard:
            for record in itertools.islice(records, SHARD):
                shard.write(record)
    write_manifest(folder, names, about.extractors, about.region_classes, about.codebook, about.region_attributes,
                   about.speech_codebooks, about.origins)


def measured(shards: Path, out: Path) -> float:
    """CPU-seconds of a step, measured once."""
    path = out / "cpu_seconds.json"
    if not path.exists():
        reader = ShardReader(shards)
        system = build("blip", MODEL, Tokenizer.train(reader.captions(), 2000), facts(reader.manifest))
        loop = LoopConfig(steps=10**6, batch_tokens=BATCH_TOKENS, workers=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer, spent = Trainer(system, reader, Path(folder), loop, OptimConfig()), []
            for batches in itertools.islice(trainer.loader(), MEASURED_STEPS):
                began = time.process_time()
                trainer.train_step(batches[0])
                spent.append(time.process_time() - began)
        write_atomic(path, json.dumps(float(np.mean(spent[WARM_UP_STEPS:]))).encode())
    return float(json.loads(path.read_text()))


def pretrain(out: Path, name: str, shards: Path, steps: int, weights: Sequence[int] = ()) -> float:
    """OUT/NAME/model, from nothing or, with weights of the parts, from `before`; CPU-seconds that it took."""
    path = out / name / "seconds.json"
    if not path.exists():
        parts = zip(("contrast", "match", "language"), weights, strict=False)
        tuned = [word for part, weight in parts for word in (f"--model.{part}-weight", weight)]
        start = ["--start", f"model:{out / 'before' / 'model'}"] if weights else []
        began = time.process_time()
        do("pretrain", "blip.tiny", "--shards", shards, "--out", out / name, "--loop.steps", steps, "--loop.workers", 0,
           "--loop.batch-tokens", BATCH_TOKENS, "--loop.save-every", steps, "--optim.learning-rate",
           TUNING_RATE if weights else RATE, *OPTIONS, *tuned, *start)
        write_atomic(path, json.dumps(time.process_time() - began).encode())
    return float(json.loads(path.read_text()))


def removed(captioned: Path, filtered: Path, swapped: set[str]) -> dict[str, float]:
    """How many captions of each kind went, and stayed."""
    before, after = (_kinds(folder, swapped) for folder in (captioned, filtered))
    left = {kind: after[kind] / max(1, count) for kind, count in before.items()}
    return {"captions": before.total(), "wrong_removed": round(1 - left.get("wrong", 0.0), 4),
            "right_kept": round(left.get("right", 0.0), 4), "synthetic_kept": round(left.get(SYNTHETIC, 0.0), 4)}


def _kinds(folder: Path, swapped: set[str]) -> Counter[str]:
    reader = ShardReader(folder)

    def kind(record: Record, narration_id: str) -> str:
        return narration_id if narration_id == SYNTHETIC else "wrong" if record.key in swapped else "right"

    firsts = np.flatnonzero(reader.column("narration") == 0).tolist()
    records = (reader.record(number) for number in firsts)
    return Counter(kind(record, told.narration_id) for record in records for told in record.narrations)


def judged(run: Path, test: Path) -> dict[str, float]:
    """Retrieval and captions on the test shards."""
    found = {}
    for task, wanted in SCORES.items():
        if not (run / "results" / f"{task}.json").exists():
            do("eval", task, run / "model", test, "--out", run / "results")
        metrics = json.loads((run / "results" / f"{task}.json").read_text())["metrics"]
        values = {metric["name"]: metric["value"] for metric in metrics}
        found |= {f"{task}.{name}": round(values[f"{task}.{name}"], 4) for name in wanted}
    return found


if __name__ == "__main__":
    main()
