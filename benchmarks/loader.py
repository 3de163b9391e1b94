"""Reading measured: records a second against .npz files, the wait of a training step for data, memory by data-set size.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--records 600] [--steps 12]

over_npz: the reader's records a second over those of one `np.savez` file a sample (features, boxes, frames, image
    codes, token ids; features float16 in both) read by `np.load`, as published code for region features does; of the
    larger shape. Both from the page cache, in one process, in the same random order, by turns, in CPU seconds, so that
    programs beside it do not count; the median of the turns' ratios. The reader compares checksums, as .npz files do.
over_npz_compressed: the same for `np.savez_compressed`. over_npz_tokenised: over_npz where the reader's captions become
    token ids, which .npz files hold already and our preparer makes in each epoch.
wait_share: of the seconds of training `opt.small` with one worker, those in which the trainer waited for its batches.
rss_growth_mb: how much more memory a training process takes, at its peak, for 1,000,000 samples than for 10,000: from
    before the reader is made to the first batches (lengths, plan, one worker), in fresh processes. Shards of 500
    samples with an index each, whose rows all name the same few real records.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from opt.data.loader import Loader
from opt.data.manifest import shard_name, write_manifest
from opt.data.plan import Plan
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter
from opt.data.tokenizer import SPECIALS, Tokenizer
from opt.recipe import LoopConfig
from opt.systems.opt import OPT, small
from opt.systems.opt.rows import Rows
from pretrain.parallel import counted_together
from pretrain.run import facts
from pretrain.trainer import Trainer

SHAPES = {
    "100 x 2048 regions, 256 x 768 frames": (100, 2048, 256),
    "36 x 1024 regions, 128 x 768 frames": (36, 1024, 128),
}
SPEECH_WIDTH, CLASSES, CODES, WORDS, VOCABULARY = 768, 1600, 8192, 60, 30_522
IN_A_SHARD = 500
SMALL, LARGE = 10_000, 1_000_000
TURNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=600, help="records that are read")
    parser.add_argument("--steps", type=int, default=12, help="training steps")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # what a subprocess does
    given = parser.parse_args()
    if given.memory_of is not None:
        print(json.dumps(memory(given.memory_of)))
        return
    figures: dict[str, Any] = {"shapes": {}}
    with tempfile.TemporaryDirectory() as name:
        for number, (shape, sizes) in enumerate(SHAPES.items()):
            folder = Path(name) / str(number)
            write_records(folder, sizes, given.records)
            figures["shapes"][shape] = rates(folder, given.records)
        figures |= next(iter(figures["shapes"].values()))
        figures |= waiting(Path(name) / "0", given.steps)
        figures |= growth(Path(name))
    print(json.dumps(figures))


def write_records(folder: Path, sizes: tuple[int, int, int], number: int) -> None:
    """The same made-up records as shards, as .npz files and as compressed ones."""
    rng = np.random.default_rng(0)
    names = [shard_name(shard) for shard in range(-(-number // IN_A_SHARD))]
    tokenizer = vocabulary(folder)
    for shard, name in enumerate(names):
        with ShardWriter(folder, name) as writer:
            for place in range(shard * IN_A_SHARD, min(number, (shard + 1) * IN_A_SHARD)):
                record = made_up(rng, f"k{place}", sizes)
                writer.write(record)
                picture, told = record.pictures[0], record.narrations[0]
                arrays = {"regions": picture.regions, "boxes": picture.boxes, "frames": told.speech,
                          "codes": picture.codes, "ids": tokenizer.encode(told.caption or "", 128)}
                np.savez(folder / f"{place}.npz", **arrays)  # type: ignore[arg-type]
                np.savez_compressed(folder / f"{place}.small.npz", **arrays)  # type: ignore[arg-type]
    write_manifest(folder, names, {}, tuple(f"class{number}" for number in range(CLASSES)), CODES)


def made_up(rng: np.random.Generator, key: str, sizes: tuple[int, int, int]) -> Record:
    """Random features; those of regions end in a ReLU, as detectors' do."""
    regions, width, frames = sizes
    boxes = np.sort(rng.random((regions, 2, 2), np.float32), axis=1).reshape(-1, 4)
    features = rng.normal(size=(regions, width)).clip(0).astype(np.float16)
    picture = Picture(640, 480, features, boxes, rng.integers(CLASSES, size=regions).astype(np.int16),
                      np.full(regions, 0.9, np.float32), codes=rng.integers(CODES, size=(8, 8)).astype(np.int16))
    caption = " ".join(f"w{word}" for word in rng.integers(20_000, size=WORDS))
    speech = rng.normal(size=(frames, SPEECH_WIDTH)).astype(np.float16)
    return Record(key, (picture,), (Narration("0", caption, speech, 7.0, frames / 7),))


def vocabulary(folder: Path) -> Tokenizer:
    """Words w0, w1, ... and the special tokens."""
    folder.mkdir(exist_ok=True)
    words = [*SPECIALS, *(f"w{number}" for number in range(VOCABULARY - len(SPECIALS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer.from_vocab(folder / "vocab.txt")


def rates(folder: Path, number: int) -> dict[str, Any]:
    """Records a CPU second of each way to read, by turns, and the reader's over the others'."""
    reader, tokenizer = ShardReader(folder), Tokenizer.from_vocab(folder / "vocab.txt")

    def npz(place: int, end: str) -> None:
        with np.load(folder / f"{place}{end}", allow_pickle=False) as arrays:
            for name in arrays.files:
                arrays[name]

    ways: dict[str, Callable[[int], Any]] = {
        "reader": reader.sample,
        "tokenised": lambda place: tokenizer.encode(reader.sample(place).caption or "", 128),
        "npz": lambda place: npz(place, ".npz"),
        "npz_compressed": lambda place: npz(place, ".small.npz"),
    }
    order = np.random.default_rng(1).permutation(number).tolist()
    turns: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + TURNS):  # the first fills the page cache
        for way, read in ways.items():
            began = time.process_time()
            for place in order:
                read(place)
            turns[way].append(number / (time.process_time() - began))

    def over(way: str, other: str) -> float:
        return round(statistics.median(map(lambda a, b: a / b, turns[way][1:], turns[other][1:])), 2)

    return {
        "over_npz": over("reader", "npz"), "over_npz_compressed": over("reader", "npz_compressed"),
        "over_npz_tokenised": over("tokenised", "npz"),
        "records_per_second": {way: round(statistics.median(figures[1:])) for way, figures in turns.items()},
    }


def waiting(folder: Path, steps: int) -> dict[str, Any]:
    """Share of the time that training waits for data, after the first two steps, which start the worker."""
    reader, preset = ShardReader(folder), small()
    system = OPT(preset.model, Tokenizer.from_vocab(folder / "vocab.txt"), facts(reader.manifest))
    trainer = Trainer(system, reader, folder / "run", LoopConfig(batch_tokens=8192, workers=1), preset.optim)
    loader = trainer.loader()
    tokens, waited, began = 0, 0.0, 0.0
    for number, (batches, _) in enumerate(islice(loader, 2 + steps)):
        if number == 2:
            tokens, waited, began = 0, loader.waited, time.perf_counter()
        tokens += sum(batch.tokens for batch in batches)
        trainer.train_step(counted_together(batches)[0])
    seconds = time.perf_counter() - began
    return {"wait_share": round((loader.waited - waited) / seconds, 4), "steps": steps,
            "seconds_per_step": round(seconds / steps, 2), "tokens_per_second": round(tokens / seconds)}


def growth(folder: Path) -> dict[str, Any]:
    """Memory of a process that begins to train, with few samples and with many: the median of three each."""
    figures: dict[int, dict[str, float]] = {}
    for samples in (SMALL, LARGE):
        synthetic(folder / str(samples), samples)
        command = [sys.executable, __file__, "--memory-of", str(folder / str(samples))]
        answers = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
        figures[samples] = {name: statistics.median(answer[name] for answer in answers) for name in answers[0]}
    more = {name: figures[LARGE][name] - figures[SMALL][name] for name in ("peak", "stays")}
    return {
        "rss_growth_mb": round(more["peak"] / 1e6, 1), "rss_growth_that_stays_mb": round(more["stays"] / 1e6, 1),
        "bytes_a_sample": {name: round(value / (LARGE - SMALL), 1) for name, value in more.items()},
        "seconds_to_first_batch": {str(samples): values["seconds"] for samples, values in figures.items()},
    }


def synthetic(folder: Path, samples: int) -> None:
    """Shards of IN_A_SHARD samples: one small tar under many names, and an index each with keys of its own."""
    rng, sizes = np.random.default_rng(0), (10, 64, 20)
    with ShardWriter(folder, "real") as writer:
        for number in range(8):
            writer.write(made_up(rng, f"k{number}", sizes))
    rows = np.resize(np.load(folder / "real.npy"), IN_A_SHARD)
    receipt = json.loads((folder / "real.json").read_text())
    names = [shard_name(number) for number in range(samples // IN_A_SHARD)]
    for name in names:
        rows["key"] = rng.integers(2**63, size=IN_A_SHARD)
        np.save(folder / f"{name}.npy", rows)
        os.link(folder / "real.tar", folder / f"{name}.tar")
        index = (folder / f"{name}.npy").read_bytes()
        totals = {column: int(rows[column].sum()) for column in receipt["totals"]}
        (folder / f"{name}.json").write_text(json.dumps(receipt | {
            "name": name, "records": IN_A_SHARD, "samples": IN_A_SHARD, "index_bytes": len(index), "totals": totals,
            "index_sha256": hashlib.sha256(index).hexdigest()}))
    write_manifest(folder, names, {}, (), CODES)
    vocabulary(folder)


def memory(folder: Path) -> dict[str, float]:
    """Bytes that this process has grown by, at most and in the end, and seconds to the first batch."""
    preset = small()
    preparer = Rows(preset.model, vocabulary(folder), 64, SPEECH_WIDTH, CODES)
    ctypes.CDLL(None).malloc_trim(0)  # nothing of what comes hides in memory that the imports gave back
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    reader = ShardReader(folder)
    plan = Plan(0, preparer.cost(reader.lengths), preset.loop.batch_tokens, preparer.tasks, reader.key_hash,
                sizes=reader.sizes)
    seconds = 0.0
    for _ in islice(Loader(reader, plan, preparer, workers=1), 20):
        seconds = seconds or time.perf_counter() - began
    return {"peak": resident("VmHWM") - before, "stays": resident("VmRSS") - before, "seconds": round(seconds, 2)}


def resident(name: str) -> int:
    """Bytes of memory of this process, now (VmRSS) or at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
