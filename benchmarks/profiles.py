"""What the extraction profiles cost: bytes a sample, and retrieval by a model trained on them for the same CPU time.

    python benchmarks/profiles.py [--minutes 4] [--seeds 2] [--workers 2]

The same spoken scenes are extracted in the profiles full, standard and compact (feature_extract/profiles.py) by the
embedded networks; opt.tiny is trained on each, and searches among held-out scenes of the same profile: recall of the
right one first. The models of standard search in compact, too: what int8 alone costs. Prints one JSON line, the same
as OUT/profiles.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from mixing import recalls
from study import MODEL, Run, arguments, carry_out, do

from feature_extract.profiles import PROFILES
from opt.data.manifest import read_manifest
from opt.data.shards import ShardReader
from opt.files import write_atomic
from opt.systems.system import System

TRAIN, TEST, SEED = 2000, 500, 12
SPLITS = ("train", "test")
FRAMES = 512
"""Frames that the model can tell apart by position: `full` has about 300 a recording."""


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("runs/profiles"), seeds=2)
    given = parser.parse_args()
    do("scenes", "--out", given.out / "scenes", "--train", TRAIN, "--val", 0, "--test", TEST, "--seed", SEED)
    for profile in PROFILES:
        for split in SPLITS:
            do("extract", "localized_narratives", given.out / "scenes", "--split", split, "--profile", profile,
               "--out", given.out / "shards" / profile / split, "--no-jpeg")
    model = dataclasses.replace(MODEL, frame_positions=FRAMES)
    runs = [Run(profile, model, seed, given.minutes, given.out, profile)
            for seed in range(given.seeds) for profile in PROFILES]
    records = carry_out("profiles", runs, judge, given.workers)
    figures: dict[str, Any] = {"minutes": given.minutes, "seeds": given.seeds, "train": TRAIN, "test": TEST}
    for profile, rows in records.items():
        manifest = read_manifest(given.out / "shards" / profile / "train")
        figures[f"bytes.{profile}"] = round(sum(shard.bytes for shard in manifest.shards) / manifest.samples)
        figures[f"frames.{profile}"] = round(manifest.totals["frames"] / manifest.samples, 1)
        figures[f"steps.{profile}"] = rows[0]["steps"]
        for name in (name for name in rows[0] if name.startswith("r1.")):
            figures[f"{name}.{profile}"] = float(np.mean([row[name] for row in rows]))
            figures[f"{name}.{profile}.seeds"] = [row[name] for row in rows]
    write_atomic(given.out / "profiles.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(json.dumps(figures))


def judge(run: Run, system: System) -> dict[str, Any]:
    """Recall of the right one first, in the run's own profile; a standard model also among int8 features."""
    found = recalls(system, ShardReader(run.shards("test")))
    if run.data == "standard":
        int8 = recalls(system, ShardReader(run.out / "shards" / "compact" / "test"))
        found |= {f"{name}.searched_in_compact": value for name, value in int8.items()}
    return found


if __name__ == "__main__":
    main()
