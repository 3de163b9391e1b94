"""VLMo with and without its stages, its experts and each of its objectives; as a dual encoder and as a fusion encoder.

    python benchmarks/vlmo.py [--minutes 5] [--seeds 1] [--workers 2] [--only staged ...]

Every variant of `vlmo.tiny` has the same CPU time in all, which its stages share by `Stage.share`, on 3,000 scenes:

    staged             vision, then language with attention frozen, then pairs (arXiv 2111.02358, section 3.3)
    unstaged           pairs alone
    language-first     language with attention, then vision with attention frozen, then pairs
    without-experts    pairs alone, one feed-forward for all modalities
    without-contrast, without-match, without-mlm    pairs alone, one objective less

Judged on held-out scenes: `r1`, `r10` recall at 1 and 10 of 1,000 by vectors of the dual encoder, each way; `dual` and
`fusion`: recall at 1 and CPU-seconds of the same retrieval of 100 scenes, by vectors and by matching every pair.
Prints one JSON line, the same as OUT/vlmo.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import Run, arguments, carry_out, make_data, measure_steps

from eval.result import read_result
from eval.retrieval import SUFFIX, RetrievalConfig, Way, retrieval
from opt.checkpoint import from_pretrained
from opt.data.shards import ShardReader
from opt.files import write_atomic
from opt.recipe import LoopConfig, OptimConfig, Stage
from opt.systems.system import System, build
from opt.systems.vlmo import VLMoConfig, tiny
from opt.systems.vlmo.config import LANGUAGE, PAIRS, VISION
from pretrain.trainer import Trainer

BATCH_TOKENS = 8192
OPTIM = OptimConfig(learning_rate=6e-4)
WAYS = ("text_to_image", "image_to_text")
MATCHED = 100
MODEL: VLMoConfig = tiny().model
ATTENTION = ("stack.*_scale", "*.shared.*")
STAGED = (VISION, LANGUAGE, PAIRS)
LANGUAGE_FIRST = (
    dataclasses.replace(LANGUAGE, trains=(*LANGUAGE.trains, *ATTENTION)),
    dataclasses.replace(VISION, trains=tuple(name for name in VISION.trains if name not in ATTENTION)), PAIRS,
)  # fmt: skip
VARIANTS: dict[str, tuple[VLMoConfig, tuple[Stage, ...]]] = {
    "staged": (MODEL, STAGED), "unstaged": (MODEL, (PAIRS,)), "language-first": (MODEL, LANGUAGE_FIRST),
    "without-experts": (dataclasses.replace(MODEL, experts=False), (PAIRS,)),
    **{f"without-{name}": (MODEL, (dataclasses.replace(
        PAIRS, objectives=tuple(each for each in PAIRS.objectives if each != name)),)) for name in PAIRS.objectives},
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("runs/vlmo"), minutes=5.0, seeds=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    given = parser.parse_args()
    make_data(given.out)
    runs = [stage_run(variant, number, seed, given.minutes, given.out) for seed in range(given.seeds)
            for variant in given.only for number in range(len(VARIANTS[variant][1]))]
    measure_steps(runs)
    first = [run for run in runs if place(run)[1] == 0]
    records = carry_out("vlmo", first, judge, given.workers)
    figures = {place(run)[0]: {key: round(float(np.mean([row["found"][key] for row in records[run.variant]])), 4)
                               for key in records[run.variant][0]["found"]} for run in first}
    content = {"minutes": given.minutes, "seeds": given.seeds, "variants": figures}
    write_atomic(given.out / "vlmo.json", (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content))


def stage_run(variant: str, number: int, seed: int, minutes: float, out: Path) -> Run:
    """A stage of a variant by itself, with its share of the variant's `minutes`."""
    model, stages = VARIANTS[variant]
    stage = stages[number]
    return Run(f"{variant}.{number}", dataclasses.replace(model, stage=stage), seed,
               minutes * stage.share / sum(each.share for each in stages), out, system="vlmo",
               batch_tokens=BATCH_TOKENS, optim=OPTIM)


def place(run: Run) -> tuple[str, int]:
    """The variant and the number of the stage that a run is."""
    variant, _, number = run.variant.partition(".")
    return variant, int(number)


def judge(run: Run, system: System) -> dict[str, Any]:
    """Goes on with the stages behind the first, then asks the verbs."""
    variant, _ = place(run)
    stages, model = VARIANTS[variant][1], run.folder / "model"
    minutes = run.minutes * sum(each.share for each in stages) / stages[0].share
    for number in range(1, len(stages)):
        model = go_on(stage_run(variant, number, run.seed, minutes, run.out), model)
    test, results = run.shards("test"), run.folder / "results"
    retrieval(RetrievalConfig(model, test, results, by=("alignment",), directions=WAYS))
    found = {**recalls(results, "alignment", "r1"), **recalls(results, "alignment", "r10", "r10")}
    ways: dict[str, Way] = {"dual": "alignment", "fusion": "all-pairs"}
    for name, way in ways.items():
        began = time.process_time()
        retrieval(RetrievalConfig(model, test, results / name, by=(way,), directions=WAYS, limit=MATCHED))
        found |= {f"{name}.seconds": time.process_time() - began, **recalls(results / name, way, f"{name}.r1")}
    return {"found": found}


def go_on(run: Run, before: Path) -> Path:
    """The next stage, begun with the model of the one before: its own model."""
    reader, given = ShardReader(run.shards("train")), from_pretrained(before)
    torch.manual_seed(run.seed)
    system = build("vlmo", run.model, given.tokenizer, given.facts)
    system.load_state_dict(given.state_dict())
    a_step = json.loads((run.out / "cpu_seconds.json").read_text())[run.variant]
    steps = max(int(60 * run.minutes / a_step), 1)
    loop = LoopConfig(steps=steps, seed=run.seed, batch_tokens=run.batch_tokens, workers=0, save_every=steps)
    Trainer(system, reader, run.folder, loop, run.optim).run()
    return run.folder / "model"


def recalls(results: Path, way: Way, name: str, at: str = "r1") -> dict[str, float]:
    """Recall at 1, or at 10, each way."""
    values = {metric.name: metric.value for metric in read_result(results / "retrieval.json").metrics}
    return {f"{name}.{each}": values[f"retrieval.{each}.{at}{SUFFIX[way]}"] for each in WAYS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
