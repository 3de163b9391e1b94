"""A million rows: planned from nothing, and a job over them resumed at 99 %.

    python benchmarks/plan.py [--rows 1000000]

Writes that many lines in the layout of Localized Narratives without traces, plans them in a process of its own, then
puts a shard of one record in the place of each of the first 99 % of the shards, and runs `opt extract` on the rest
(whose pictures are missing, so that nothing but the job itself is measured) up to the first new receipt. Prints one
JSON line: `plan_seconds`, `plan_peak_mb`, `resume_seconds` from the command to that receipt, start of Python included,
`resume_peak_mb`, and the bytes of the plan.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from feature_extract.plan import NAME
from opt.data.manifest import shard_name
from opt.data.record import Narration, Record
from opt.data.shards import ShardWriter

SHARD_SIZE = 500
PLAN = """
import sys
from pathlib import Path
from feature_extract.plan import open_plan
from feature_extract.sources.localized_narratives import Source
source = Source(Path(sys.argv[1]), "train")
open_plan(source, "localized_narratives", Path(sys.argv[2]), lambda sha256: None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        corpus, out = Path(name) / "corpus", Path(name) / "out"
        write_rows(corpus, rows)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", PLAN, str(corpus), str(out)], check=True)
        figures: dict[str, Any] = {"rows": rows, "plan_seconds": round(time.perf_counter() - began, 1),
                                   "plan_peak_mb": _peak_mb(), "plan_bytes": (out / NAME).stat().st_size}
        figures |= resume(corpus, out, rows)
    print(json.dumps(figures))


def write_rows(corpus: Path, rows: int) -> None:
    """A million different narrations, a line each."""
    corpus.mkdir()
    with (corpus / "train_localized_narratives.jsonl").open("w") as file:
        for number in range(rows):
            caption = (f"In this image we can see {number} people standing on the grass, and in the background there "
                       "are trees, a building and the sky.")
            line = {"dataset_id": "open_images_train", "image_id": f"{number:016x}", "annotator_id": number % 500,
                    "caption": caption, "timed_caption": [], "traces": [],
                    "voice_recording": f"open_images_train/open_images_train_{number:016x}_{number % 500}.ogg"}
            file.write(json.dumps(line) + "\n")


def resume(corpus: Path, out: Path, rows: int) -> dict[str, Any]:
    """Seconds of the same command to its first new receipt, when 99 % of the receipts are there."""
    command = [sys.executable, "-m", "opt", "extract", "localized_narratives", str(corpus), "--out", str(out),
               "--codes", "none", "--shard-size", str(SHARD_SIZE)]
    shards = -(-rows // SHARD_SIZE)
    done = shards * 99 // 100
    claimed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "settings.json").exists():
        time.sleep(0.05)
    claimed.kill()
    claimed.wait()
    for shard in range(done):
        with ShardWriter(out, shard_name(shard)) as writer:
            writer.write(Record(f"stand-in-{shard}", (), (Narration("0", "words"),)))
    began = time.perf_counter()
    resumed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not any((out / f"{shard_name(shard)}.json").exists() for shard in range(done, shards)):
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    resumed.kill()
    resumed.wait()
    return {"resume_seconds": round(seconds, 1), "resume_peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Largest resident memory of any process that has ended so far."""
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
