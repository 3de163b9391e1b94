"""Three ways to mix OPT's objectives at equal compute: each row its task, each step its task, or all on one input.

    python benchmarks/mixing.py [--minutes 4] [--seeds 3] [--workers 2]

`rows` is the full OPT of ablation.py (its runs are shared), `steps` the published code's way, `joint` the paper's
Figure 1 (opt.systems.opt.config, gap A1). Each is trained for the same CPU time and judged at four points of it, on
held-out scenes: the loss, always of the corruption that `rows` makes, and recall of the right one first. Prints one
JSON line, the same as OUT/mixing.json.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from study import CHECKPOINTS, MODEL, Run, arguments, carry_out, make_data

from eval.ranking import ranks
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.files import write_atomic
from opt.objectives.term import Term, loss
from opt.systems.opt import OPT
from opt.systems.system import Progress, System
from pretrain.state import load_state

MODES = {"rows": "full", "steps": "steps", "joint": "joint"}
"""The variant of each way to mix."""
DIRECTIONS = {"text_to_image": ("text", "image"), "text_to_audio": ("text", "audio")}
LOSS_TOKENS = 200_000
"""Held-out tokens that the loss is a mean over."""


def main() -> None:
    given = arguments(__doc__).parse_args()
    make_data(given.out)
    runs = [Run(variant, dataclasses.replace(MODEL, mixing=mode), seed, given.minutes, given.out)
            for seed in range(given.seeds) for mode, variant in MODES.items()]
    records = carry_out("mixing", runs, judge, given.workers)
    figures: dict[str, Any] = {"minutes": given.minutes, "seeds": given.seeds}
    for mode, variant in MODES.items():
        rows = records[variant]
        figures[f"cpu_seconds.{mode}"] = np.mean([row["cpu_seconds_at"] for row in rows], 0).tolist()
        figures[f"steps.{mode}"] = [row["steps"] for row in rows]
        for name in rows[0]["curves"]:
            curves = np.array([row["curves"][name] for row in rows])
            figures[f"{name}.{mode}"] = float(curves[:, -1].mean())
            figures[f"{name}.{mode}.seeds"] = curves[:, -1].tolist()
            figures[f"{name}.{mode}.curve"] = curves.mean(0).tolist()
    write_atomic(given.out / "mixing.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(json.dumps(figures))


def judge(run: Run, system: System) -> dict[str, Any]:
    """Held-out losses and recall at every kept state of the run."""
    reader = ShardReader(run.shards("test"))
    states = sorted((run.folder / "checkpoints").glob("step-*"))
    assert len(states) == CHECKPOINTS, f"{run.folder} holds {len(states)} states, not {CHECKPOINTS}"
    steps = [int(path.name.removeprefix("step-")) for path in states]
    a_step = json.loads((run.folder / "trained.json").read_text())["cpu_seconds_a_step"]
    points = []
    for path in states:
        state = {"model": system.state_dict()}
        load_state(path, state)
        system.load_state_dict(state["model"])
        points.append({**held_out_losses(system, reader), **recalls(system, reader)})
    return {"cpu_seconds_at": [a_step * step for step in steps],
            "curves": {name: [point[name] for point in points] for name in points[0]}}


@torch.inference_mode()
def held_out_losses(system: System, reader: ShardReader) -> dict[str, float]:
    """Each term's mean and the loss, under the corruption of mixing `rows`, the same for all."""
    assert isinstance(system, OPT)
    asked = OPT(dataclasses.replace(system.config, mixing="rows"), system.tokenizer, system.facts).preparer()
    plan = Plan(0, asked.cost(reader.lengths), LOSS_TOKENS // 20, asked.tasks, reader.key_hash)
    totals: dict[str, Term] = {}
    for rows, _ in zip(plan.batches(), range(20), strict=False):
        numbers = np.unique(np.concatenate([rows.sample, rows.partners[rows.partners >= 0]]))
        batch = asked({int(number): reader.sample(int(number)) for number in numbers}, rows)
        for name, term in system(batch, Progress(0, 0.0)).terms.items():
            sofar = totals.get(name, Term(torch.zeros(()), torch.zeros(()), term.weight))
            totals[name] = Term(sofar.total + term.total, sofar.count + term.count, term.weight)
    return {"loss": float(loss(totals)), **{f"loss.{name}": float(term.mean()) for name, term in totals.items()}}


@torch.inference_mode()
def recalls(system: System, reader: ShardReader) -> dict[str, float]:
    """R@1 among all test samples, in both directions of DIRECTIONS' pairs."""
    samples = [reader.sample(number) for number in range(len(reader))]
    pictures = np.unique([sample.key for sample in samples], return_inverse=True)[1]
    right = pictures[:, None] == pictures[None, :]
    embedded = {name: torch.cat([system.embed(samples[start : start + 64], [name])
                                 for start in range(0, len(samples), 64)]).numpy()
                for name in {name for pair in DIRECTIONS.values() for name in pair}}
    return {f"r1.{direction}": float((ranks(embedded[query] @ embedded[sought].T, right) <= 1).mean())
            for direction, (query, sought) in DIRECTIONS.items()}


if __name__ == "__main__":
    main()
