"""How time and memory of a training step grow: with the batch's tokens, the model's width, and the data set.

    python benchmarks/scaling.py [--quick] [--out runs/scaling]

tokens   one step (forward, backward, clipping, AdamW) of opt.tiny; batches of 1,000 to 32,000 tokens
width    the same at 4,000 tokens; widths of 64 to 1,024, heads of 64, feed-forward 4 x as wide
samples  reading batches of 8,192 tokens, by one process; shards of 1,000 to 1,000,000 samples (those of loader.py)

Samples are as long as spoken descriptions of pictures are (narratives.py). Each point is measured in a process of its
own, whose peak memory it is. Seconds are those of the processor, by one thread, the fastest step of several: what else
runs on the machine adds little. Prints one JSON line, the same as OUT/scaling.json, and draws OUT/scaling.svg:

    time_slope     d log seconds / d log size by least squares: 1 is linear growth; time_slope_above: between the two
                   largest sizes
    memory_fit     megabytes = fixed + each x size, by least squares, and the share of variance that it explains; along
                   `width` the size is the number of parameters
    start_seconds  what comes before the first batch: the index read, costs, the first epoch's order
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import synthetic
from narratives import write_narratives
from paper_step import vocabulary

from opt.data.batch import Batch
from opt.data.loader import Loader
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.files import write_atomic
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig, Rows, tiny
from opt.systems.system import Progress
from pretrain.optim import adamw
from pretrain.run import facts

TOKENS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
WIDTHS = (64, 128, 256, 512, 1024)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK = {"tokens": (1_000, 2_000, 4_000), "width": (64, 128, 256), "samples": (1_000, 10_000)}
TOKENS_OF_WIDTHS, TOKENS_READ = 4_000, 8_192
SAMPLES, VOCABULARY = 128, 8_000
HEAD = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only: under a minute on 2 cores")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder of scaling.json and .svg")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # what a subprocess measures: axis, size, folder
    given = parser.parse_args()
    if given.point is not None:
        torch.set_num_threads(1)
        axis, size, folder = given.point
        print(json.dumps(read(Path(folder)) if axis == "samples" else train(axis, int(size), Path(folder))))
        return
    axes = QUICK if given.quick else {"tokens": TOKENS, "width": WIDTHS, "samples": SIZES}
    with tempfile.TemporaryDirectory() as name:
        measured = {axis: [point(axis, size, Path(name)) for size in sizes] for axis, sizes in axes.items()}
    figures = {"bfloat16": torch.cpu._is_avx512_bf16_supported(),
               **{axis: growth(axis, points) for axis, points in measured.items()}}
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out / "scaling.json", (json.dumps(figures, indent=1) + "\n").encode())
    draw(figures, given.out / "scaling.svg")
    print(json.dumps(figures))


def point(axis: str, size: int, folder: Path) -> dict[str, float]:
    """One point, measured by a process of its own on data written here."""
    if axis == "samples":
        data = folder / str(size)
        synthetic(data, size)
    elif not (data := folder / "narratives").exists():
        write_narratives(data, SAMPLES)
        vocabulary(data, VOCABULARY)
    command = [sys.executable, __file__, "--point", axis, str(size), str(data)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return {axis: size, **json.loads(answer)}


def train(axis: str, size: int, folder: Path) -> dict[str, float]:
    """Seconds and megabytes of a training step: tokens, or the model's width, are `size`."""
    reader, config = ShardReader(folder), tiny().model
    if axis == "width":
        config = dataclasses.replace(config, width=size, heads=size // HEAD, inner=4 * size)
    batch = batch_of(reader, config, size if axis == "tokens" else TOKENS_OF_WIDTHS)
    torch.manual_seed(0)
    system = OPT(config, Tokenizer.from_vocab(folder / "vocab.txt"), facts(reader.manifest)).train()
    optimizer = adamw(system, tiny().optim)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 5 and len(seconds) < 20):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            terms = system(batch, Progress(0, 0.0)).terms
        loss(terms).backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    return {"batch_tokens": batch.tokens, "parameters": sum(parameter.numel() for parameter in system.parameters()),
            "seconds": min(seconds), "megabytes": peak_memory()}


def batch_of(reader: ShardReader, config: OPTConfig, tokens: int) -> Batch:
    """As many samples as have `tokens` tokens, three at least, as one batch."""
    preparer = Rows(config, Tokenizer.from_vocab(reader.folder / "vocab.txt"), reader.manifest.region_width,
                    reader.manifest.speech_width, reader.manifest.codebook)
    costs = preparer.cost(reader.lengths)
    rows = max(3, int(np.searchsorted(np.cumsum(costs), tokens, side="right")))
    plan = Plan(0, costs[:rows], int(costs[:rows].sum()), preparer.tasks, reader.key_hash[:rows], multiple=rows)
    return preparer({number: reader.sample(number) for number in range(rows)}, plan.batch_at(0))


def read(folder: Path) -> dict[str, float]:
    """Seconds to the first batch and for each one after it, and megabytes of the process that reads them."""
    began, preset = time.process_time(), tiny()
    reader = ShardReader(folder)
    preparer = Rows(preset.model, Tokenizer.from_vocab(folder / "vocab.txt"), reader.manifest.region_width,
                    reader.manifest.speech_width, reader.manifest.codebook)
    plan = Plan(0, preparer.cost(reader.lengths), TOKENS_READ, preparer.tasks, reader.key_hash, sizes=reader.sizes)
    marks = [began]
    for _ in islice(Loader(reader, plan, preparer, workers=0), 40):
        marks.append(time.process_time())
    start, *batches = np.diff(marks).tolist()
    return {"seconds": statistics.median(batches), "start_seconds": start, "megabytes": peak_memory()}


def peak_memory() -> float:
    """The most memory that this process has held, in megabytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def growth(axis: str, points: list[dict[str, float]]) -> dict[str, Any]:
    """The points of an axis, and how seconds and megabytes grow along it."""
    size = np.array([entry["batch_tokens" if axis == "tokens" else axis] for entry in points], float)
    seconds, megabytes = (np.array([entry[name] for entry in points]) for name in ("seconds", "megabytes"))
    slope, _ = np.polyfit(np.log(size), np.log(seconds), 1)
    held = np.array([entry["parameters"] for entry in points]) if axis == "width" else size
    each, fixed = np.polyfit(held, megabytes, 1)
    unexplained = np.square(megabytes - fixed - each * held).sum() / np.square(megabytes - megabytes.mean()).sum()
    above = np.diff(np.log(seconds[-2:])) / np.diff(np.log(size[-2:]))
    return {
        "time_slope": round(float(slope), 3), "time_slope_above": round(float(above[0]), 3),
        "memory_fit": {"fixed": round(float(fixed), 1), "each": float(f"{each:.4g}"),
                       "explained": round(float(1 - unexplained), 4)},
        "points": [{name: float(f"{value:.4g}") for name, value in entry.items()} for entry in points],
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Seconds above, megabytes below, one column for each axis."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9})
    names = {"tokens": "tokens of a batch", "width": "width of the model", "samples": "samples of the data set"}
    canvas, panels = pyplot.subplots(2, 3, figsize=(9, 5), sharex="col", sharey="row", layout="constrained")
    for column, (axis, name) in enumerate(names.items()):
        points = figures[axis]["points"]
        sizes = [each["batch_tokens" if axis == "tokens" else axis] for each in points]
        upper, lower = panels[:, column]
        upper.loglog(sizes, [each["seconds"] for each in points], "o-")
        upper.set_title(f"slope {figures[axis]['time_slope']:.2f}", fontsize=9)
        lower.plot(sizes, [each["megabytes"] for each in points], "o-")
        lower.set(xscale="log", xlabel=name)
        for panel in (upper, lower):
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("seconds a step, or a batch read")
    panels[1, 0].set(ylabel="megabytes at the peak", ylim=(0, None))
    canvas.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
