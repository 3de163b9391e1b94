"""ViLEM with and without mistakes to learn from, trained for the same CPU time on the same spoken scenes.

    python benchmarks/vilem.py [--minutes 5] [--seeds 1] [--workers 2] [--only vilem.tiny ...]

    vilem.tiny, vilem.trimodal  the presets
    vilem.tiny.no-edits, ...    contrast alone, which so has more steps
    vilem.tiny.all-at-once      all edited places of a text masked at once, not each by itself

Judged on 1,000 held-out scenes by the verbs that a user has:

    r1                          recall at 1 of 1,000, in each direction between two modalities
    found, corrected            the one wrong word of a caption, found by the picture or the speech, and put right
    ..._by_words                the same beside another scene's picture or speech: what the words alone give away
    detection_ap                average precision of "this word is wrong" over all words

Prints one JSON line, the same as OUT/vilem.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import Run, arguments, carry_out, make_data

from eval.proofreading import ProofreadConfig, proofread
from eval.result import read_result
from eval.retrieval import DIRECTIONS, RetrievalConfig, retrieval
from opt.files import write_atomic
from opt.recipe import OptimConfig
from opt.systems.system import System
from opt.systems.vilem import ViLEMConfig, tiny, trimodal

BATCH_TOKENS = 8192
OPTIM = OptimConfig(learning_rate=6e-4)
SINGLE = [name for name, (given, sought) in DIRECTIONS.items() if len(given) == len(sought) == 1]


def variants(only: list[str]) -> dict[str, ViLEMConfig]:
    """Configurations by name: all of them, or those named."""
    found = {}
    for name, preset in (("vilem.tiny", tiny()), ("vilem.trimodal", trimodal())):  # named as benchmarks/systems.py does
        found[name] = preset.model
        found[f"{name}.no-edits"] = dataclasses.replace(preset.model, edits="none")
    found["vilem.tiny.all-at-once"] = dataclasses.replace(tiny().model, edits="all")
    return {name: model for name, model in found.items() if not only or name in only}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("runs/vilem"), minutes=5.0, seeds=1)
    parser.add_argument("--only", nargs="*", default=[], help="variants; all where it is left out")
    given = parser.parse_args()
    make_data(given.out)
    runs = [Run(name, model, seed, given.minutes, given.out, system="vilem", batch_tokens=BATCH_TOKENS, optim=OPTIM)
            for seed in range(given.seeds) for name, model in variants(given.only).items()]
    records = carry_out("vilem", runs, judge, given.workers)
    figures = {name: {key: _mean([row[key] for row in rows]) for key in rows[0] if key not in ("variant", "folder")}
               for name, rows in records.items()}
    content = {"minutes": given.minutes, "seeds": given.seeds, "variants": figures}
    write_atomic(given.out / "vilem.json", (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content))


def judge(run: Run, system: System) -> dict[str, Any]:
    """What the verbs find."""
    model, test, results = run.folder / "model", run.shards("test"), run.folder / "results"
    retrieval(RetrievalConfig(model, test, results, directions=tuple(SINGLE)))
    metrics = [metric for metric in read_result(results / "retrieval.json").metrics if metric.name.endswith(".r1")]
    chances = {}
    if system.config.edits != "none":
        proofread(ProofreadConfig(model, test, results))
        proofreading = read_result(results / "proofread.json").metrics
        metrics += proofreading
        chances = {f"{_short(metric.name)}.chance": metric.chance for metric in proofreading}
    return {_short(metric.name): metric.value for metric in metrics} | chances


def _short(name: str) -> str:
    return name.partition(".")[2]


def _mean(values: list[Any]) -> Any:
    return round(float(np.mean(values)), 4) if all(isinstance(value, int | float) for value in values) else values[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
