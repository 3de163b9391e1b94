"""All systems, deaf and hearing, trained for the same CPU time on the same scenes: what each finds, writes and takes.

    python benchmarks/systems.py [--minutes 5] [--seeds 1] [--workers 2] [--only albef ...]

Every system's `tiny` and `trimodal` presets, found by their files, on 3,000 spoken scenes; the ALBEF that hears also
with random negatives in place of hard ones, and without momentum distillation. Judged on 1,000 held-out scenes by the
verbs that a user has, each system by what it can do:

    r1               recall at 1 of 1,000 by the vectors of the shared space, in each direction between two modalities
    r1_two_stage     the same where matching orders the first 20 again, between captions and pictures
    r1_all_pairs     of the first 200 scenes by matching of every pair, captions with pictures and with recordings
    object_hit, cider_d   captions written from pictures alone
    embed_ms         milliseconds of one thread to embed a picture, a caption

Prints one JSON line, the same as OUT/systems.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import Run, arguments, carry_out, do, make_data

from eval.captioning import CaptionConfig, caption
from eval.result import read_result
from eval.retrieval import DIRECTIONS, RetrievalConfig, retrieval
from opt.config import UserError
from opt.data.shards import ShardReader
from opt.files import write_atomic
from opt.recipe import OptimConfig
from opt.systems.system import System, load, names, presets, system_module

BATCH_TOKENS = 8192
OPTIM = OptimConfig(learning_rate=6e-4)
PRESETS = ("tiny", "trimodal")
SINGLE = [name for name, (given, sought) in DIRECTIONS.items() if len(given) == len(sought) == 1]
PAIRED = ("text_to_image", "image_to_text", "text_to_audio", "audio_to_text")
MATCHED, TIMED = 200, 256
UNITS, TOLD_IN_UNITS = "units", ("beit3.trimodal",)
"""The shards with speech codes, and who predicts these."""


def variants(only: list[str]) -> dict[str, tuple[str, Any]]:
    """By variant its system and configuration: presets of all systems, and ALBEF without two of its parts."""
    found = {f"{system}.{preset}": (system, load(f"{system}.{preset}").model) for system in names() if system != "dvae"
             for preset in presets(system_module(system)) if preset in PRESETS}
    albef = found["albef.trimodal"][1]
    found["albef.random-negatives"] = ("albef", dataclasses.replace(albef, negatives="random"))
    found["albef.no-distillation"] = ("albef", dataclasses.replace(albef, distillation=0.0))
    return {name: each for name, each in found.items() if not only or name.partition(".")[0] in only or name in only}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("runs/systems"), minutes=5.0, seeds=1)
    parser.add_argument("--only", nargs="*", default=[], help="systems or variants; all where it is left out")
    given = parser.parse_args()
    make_data(given.out)
    make_units(given.out)
    runs = [Run(name, model, seed, given.minutes, given.out, UNITS if name in TOLD_IN_UNITS else "", system,
                BATCH_TOKENS, OPTIM) for seed in range(given.seeds)
            for name, (system, model) in variants(given.only).items()]
    records = carry_out("systems", runs, judge, given.workers)
    figures = {name: {key: _mean([row[key] for row in rows]) for key in rows[0] if key not in ("variant", "folder")}
               for name, rows in records.items()}
    content = {"minutes": given.minutes, "seeds": given.seeds, "systems": figures}
    write_atomic(given.out / "systems.json", (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content))


def make_units(out: Path) -> None:
    """The same shards with speech codes: k-means of the training part's frames."""
    plain, units = out / "shards", out / "shards" / UNITS
    do("shards", "units", plain / "train", "--out", units / "train", "--clusters", 100)
    do("shards", "units", plain / "test", "--out", units / "test", "--centroids", units / "train/centroids.safetensors")


def judge(run: Run, system: System) -> dict[str, Any]:
    """What the verbs find; figures that a system has not are absent."""
    model, test, results = run.folder / "model", run.shards("test"), run.folder / "results"
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in system.parameters())}
    for part, settings in {
        "": RetrievalConfig(model, test, results, directions=tuple(SINGLE)),
        "of 200": RetrievalConfig(model, test, results / "all_pairs", limit=MATCHED, by=("all-pairs",),
                                  directions=PAIRED, matched_directions=PAIRED),
    }.items():
        try:
            retrieval(settings)
        except UserError as error:
            found[f"cannot search {part}".strip()] = str(error)
        else:
            result = read_result((results if not part else results / "all_pairs") / "retrieval.json")
            found |= {metric.name.removeprefix("retrieval."): metric.value for metric in result.metrics
                      if ".r1" in metric.name}
    try:
        caption(CaptionConfig(model, test, results, labels=run.out / "scenes" / "test_scenes.jsonl"))
    except UserError as error:
        found["cannot write"] = str(error)
    else:
        found |= {metric.name: metric.value for metric in read_result(results / "caption.json").metrics
                  if metric.name in ("caption.object_hit", "caption.cider_d")}
    return found | embedding_times(system, ShardReader(test))


def embedding_times(system: System, reader: ShardReader) -> dict[str, float]:
    """Milliseconds to embed a picture and a caption, the median over batches of 32."""
    samples = [reader.sample(number, jpeg=True) for number in range(TIMED)]
    found = {}
    for name in ("image", "text"):
        seconds = []
        try:
            for start in range(0, TIMED, 32):
                began = time.perf_counter()
                system.embed(samples[start : start + 32], [name])
                seconds.append(time.perf_counter() - began)
        except UserError:
            continue
        found[f"embed_ms.{name}"] = round(1000 * float(np.median(seconds)) / 32, 3)
    return found


def _mean(values: list[Any]) -> Any:
    return round(float(np.mean(values)), 4) if all(isinstance(value, int | float) for value in values) else values[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
