"""COTS on spoken scenes, same CPU time: its filter where 20 % of the pairs are wrong, and each of its three levels.

    python benchmarks/cots.py [--minutes 4] [--seeds 1] [--workers 2] [--out runs/cots]

    3,000 scenes, clean:  full                      no-instance, no-token, no-task: without one level each
    600 of them tell what another one shows:        filtered, filtered-1 (at 1 deviation instead of 2), unfiltered

All are judged on 1,000 clean held-out scenes by recall at 1 of 1,000. Those with wrong pairs are also asked, when they
are trained, which of their training pairs the filter leaves out, at 1, 1.5 and 2 deviations: how many of these are
wrong (precision), how many of the wrong ones are left out (recall), how many of the right ones; and how often a right
pair is more alike than a wrong one (separation). Prints one JSON line, the same as OUT/cots.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import SEED, Run, arguments, carry_out, make_data

from eval.result import read_result
from eval.retrieval import RetrievalConfig, retrieval
from opt.data.manifest import shard_name, write_manifest
from opt.data.shards import ShardReader, ShardWriter
from opt.files import write_atomic
from opt.recipe import OptimConfig
from opt.systems.cots import COTS, COTSConfig, tiny
from opt.systems.system import System

BATCH_TOKENS = 8192
OPTIM = OptimConfig(learning_rate=6e-4)
DIRECTIONS = ("text_to_image", "image_to_text")
WRONG = 0.2
SWAPPED = "swapped"
DEVIATIONS = (1.0, 1.5, 2.0)
AT_ONCE = 64


def variants() -> dict[str, tuple[str, COTSConfig]]:
    """By variant its data and configuration."""
    model = tiny().model
    levels = {f"no-{level}": ("", dataclasses.replace(model, **{f"{level}_weight": 0.0}))
              for level in ("instance", "token", "task")}
    filters = {"filtered": model, "filtered-1": dataclasses.replace(model, deviations=1.0),
               "unfiltered": dataclasses.replace(model, filtered="none")}
    return {"full": ("", model), **levels, **{name: (SWAPPED, each) for name, each in filters.items()}}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("runs/cots"), minutes=4.0, seeds=1)
    given = parser.parse_args()
    make_data(given.out)
    swap(given.out)
    runs = [Run(name, model, seed, given.minutes, given.out, data, "cots", BATCH_TOKENS, OPTIM)
            for seed in range(given.seeds) for name, (data, model) in variants().items()]
    records = carry_out("cots", runs, judge, given.workers)
    figures = {name: {key: _mean([row[key] for row in rows]) for key in rows[0] if key not in ("variant", "folder")}
               for name, rows in records.items()}
    content = {"minutes": given.minutes, "seeds": given.seeds, "variants": figures}
    write_atomic(given.out / "cots.json", (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content))


def swap(out: Path) -> None:
    """OUT/shards/swapped/train, where it is not there yet: some records tell what the next one of them shows."""
    if _swapped_keys(out).exists():
        return
    source, folder = ShardReader(out / "shards" / "train"), out / "shards" / SWAPPED / "train"
    firsts = np.flatnonzero(source.column("narration") <= 0)
    wrong = np.random.default_rng(SEED).permutation(firsts)[: round(WRONG * len(firsts))]
    teller = dict(zip(wrong.tolist(), np.roll(wrong, -1).tolist(), strict=True))
    with ShardWriter(folder, shard_name(0), source.manifest.storage == "int8") as shard:
        for number in firsts.tolist():
            told = source.record(teller.get(number, number)).narrations
            shard.write(dataclasses.replace(source.record(number, jpeg=True), narrations=told))
    about = source.manifest
    write_manifest(folder, [shard_name(0)], about.extractors, about.region_classes, about.codebook,
                   about.region_attributes, about.speech_codebooks, about.origins)
    keys = [source.sample(number).key for number in teller]
    write_atomic(_swapped_keys(out), json.dumps(sorted(keys)).encode())


def judge(run: Run, system: System) -> dict[str, Any]:
    """Recall at 1 of clean scenes, and what the filter leaves out of the pairs that it was trained on."""
    assert isinstance(system, COTS)
    results = run.folder / "results"
    retrieval(RetrievalConfig(run.folder / "model", run.out / "shards" / "test", results, directions=DIRECTIONS))
    found = {metric.name.removeprefix("retrieval."): metric.value
             for metric in read_result(results / "retrieval.json").metrics if metric.name.endswith(".r1")}
    return found | (left_out(run, system) if run.data == SWAPPED else {})


def left_out(run: Run, system: COTS) -> dict[str, Any]:
    """Precision and recall of the filter over all training pairs, as the twin and the ring are at the end."""
    reader, wrong_keys = ShardReader(run.shards("train")), set(json.loads(_swapped_keys(run.out).read_text()))
    wrong, similar = [], []
    for start in range(0, len(reader), AT_ONCE):
        samples = [reader.sample(number, jpeg=True) for number in range(start, min(start + AT_ONCE, len(reader)))]
        wrong += [sample.key in wrong_keys for sample in samples]
        similar.append(system.similarity(samples, "text", "image"))
    similar_N, wrong_N = torch.cat(similar), torch.tensor(wrong)
    found: dict[str, Any] = {"pairs": len(wrong_N), "wrong_pairs": int(wrong_N.sum()),
                             "separation": round(_separation(similar_N, wrong_N), 4)}
    for deviations in DEVIATIONS:
        system.config = dataclasses.replace(system.config, filtered="below", deviations=deviations)
        out_N = ~system.trusted(similar_N, torch.ones_like(wrong_N), "text", "image")
        found[f"precision.{deviations:g}"] = _share(wrong_N[out_N])
        found[f"recall.{deviations:g}"] = _share(out_N[wrong_N])
        found[f"right_left_out.{deviations:g}"] = _share(out_N[~wrong_N])
    return found


def _separation(similar_N: torch.Tensor, wrong_N: torch.Tensor) -> float:
    """How often a right pair is more alike than a wrong one."""
    wrong, right = similar_N[wrong_N].sort().values, similar_N[~wrong_N]
    return float(torch.searchsorted(wrong, right).double().mean() / len(wrong))


def _share(true: torch.Tensor) -> float | None:
    """How many are true; None of none."""
    return round(float(true.double().mean()), 4) if len(true) else None


def _swapped_keys(out: Path) -> Path:
    return out / "shards" / SWAPPED / "keys.json"


def _mean(values: list[Any]) -> Any:
    return round(float(np.mean(values)), 4) if all(isinstance(value, int | float) for value in values) else values[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
