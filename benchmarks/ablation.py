"""What each objective and each modality is worth: the paper's Tables 2 and 5, on spoken scenes.

    python benchmarks/ablation.py [--minutes 4] [--seeds 3] [--workers 2]

Full OPT against itself without masked words (MLM), regions (MVM), frames (MAM), the modality level (whole modalities
hidden, text and codes written), the sample level (five-way matching), and untrained; each run trained for the same CPU
time, then a linear probe of its frozen features: mAP of the objects in held-out scenes, from every subset of
modalities. Figures are means over the seeds; intervals are 95 % bootstrap over test scenes and seeds together, and
differences are paired: the same scenes, the same seed. Prints one JSON line, the same as OUT/ablation.json.
Shape legend: S bootstrap resamples, R runs of a variant.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from study import MODEL, Run, arguments, carry_out, make_data

from eval.classification import SUBSETS
from eval.metrics import interval
from eval.naming import read_labels
from eval.probing import Exam, open_exam
from eval.task import Split, in_batches, open_split
from opt.files import write_atomic
from opt.systems.opt import OPTConfig
from opt.systems.system import System

TRIPLE = "_".join(SUBSETS[-1])
PROBED = 3000
"""Most training samples that the probe is fitted on."""


def variants() -> dict[str, OPTConfig]:
    """Full OPT, and OPT without each of its parts; what a task gives up goes to the others in proportion."""

    def without(*tasks: str, **changes: Any) -> OPTConfig:
        shares = dataclasses.replace(MODEL.shares, **dict.fromkeys(tasks, 0.0))
        return dataclasses.replace(MODEL, shares=shares, **changes)

    return {
        "full": MODEL,
        "without_mlm": without("mlm"),
        "without_mvm": without("mvm"),
        "without_mam": without("mam"),
        "without_modality_level": without("dtr", "dir", modality_rate=0.0),
        "without_sample_level": without("match"),
        "without_alignment": dataclasses.replace(MODEL, alignment_weight=0.0),
    }


def main() -> None:
    given = arguments(__doc__).parse_args()
    make_data(given.out)
    plans = [(name, model, given.minutes) for name, model in variants().items()] + [("untrained", MODEL, 0.0)]
    runs = [Run(name, model, seed, minutes, given.out) for seed in range(given.seeds) for name, model, minutes in plans]
    records = carry_out("ablation", runs, judge, given.workers)
    figures = summary(records, given.out)
    write_atomic(given.out / "ablation.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(json.dumps(figures))


def judge(run: Run, system: System) -> dict[str, Any]:
    """mAP of the linear probe; every subset of modalities where the variant is full or untrained, all three elsewhere.
    The resampled values go beside the record as draws.npz."""
    train, test = (open_split(run.shards(split), PROBED, system) for split in ("train", "test"))
    labels = {key: names for split in ("train", "test")
              for key, names in read_labels(run.out / "scenes" / f"{split}_scenes.jsonl").items()}
    exam = open_exam(train, test, labels, seed=0)
    wanted = SUBSETS if run.variant in ("full", "untrained") else SUBSETS[-1:]
    scores = {"_".join(subset): exam.probe(*(_features(system, exam, split, subset) for split in (train, test)))
              for subset in wanted}
    np.savez(run.folder / "draws.npz", **{name: score.draws for name, score in scores.items()})
    return {"map": {name: score.value for name, score in scores.items()}}


def _features(system: System, exam: Exam, split: Split, subset: tuple[str, ...]) -> np.ndarray:
    numbers = exam.train_numbers if split is exam.train else exam.test_numbers
    answers = in_batches([partial(split.sample, int(number)) for number in numbers],
                         lambda samples: list(system.features(samples, subset).numpy()), 64, " + ".join(subset))
    return np.stack(answers)


def summary(records: dict[str, list[dict[str, Any]]], out: Path) -> dict[str, Any]:
    """map.VARIANT, its interval and seeds; gain.PART = full minus without it; table2.SUBSET of full OPT."""
    seeds = len(records["full"])
    chosen = np.random.default_rng(0).integers(seeds, size=(1000, seeds))  # seeds of each resample, for all variants
    figures: dict[str, Any] = {}
    draws: dict[str, np.ndarray] = {}
    for variant, rows in records.items():
        for subset in rows[0]["map"]:
            name = f"map.{variant}" if subset == TRIPLE else f"map.{variant}.{subset}"
            values = [row["map"][subset] for row in rows]
            draws_RS = np.stack([np.load(out / "runs" / row["folder"] / "draws.npz")[subset] for row in rows])
            draws[name] = draws_RS[chosen, np.arange(1000)[:, None]].mean(1)
            figures[name] = float(np.mean(values))
            figures[f"{name}.interval"] = interval(draws[name], figures[name])
            figures[f"{name}.seeds"] = values
    for variant in records:
        if variant.startswith("without_"):
            gain = figures["map.full"] - figures[f"map.{variant}"]
            figures[f"gain.{variant.removeprefix('without_')}"] = gain
            figures[f"gain.{variant.removeprefix('without_')}.interval"] = interval(
                draws["map.full"] - draws[f"map.{variant}"], gain)
    about = ("steps", "cpu_seconds_a_step", "cpu_seconds", "losses")
    figures["runs"] = [{key: row.get(key) for key in ("variant", "seed", "minutes", *about)}
                       for rows in records.values() for row in rows]
    return figures


if __name__ == "__main__":
    main()
