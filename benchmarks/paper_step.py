"""One full training step of `opt.paper` on made-up samples of the paper's sizes: parameters, seconds, memory.

    OMP_NUM_THREADS=1 python benchmarks/paper_step.py [--tokens 10240] [--later 3]

Shards of 100 regions x 2,048, about 60 words of 30,522, up to 256 frames x 768 and 64 of 8,192 codes a sample are
written to a temporary folder, read by the loader, and the trainer takes its own steps: all six tasks, forward,
backward, clipping, Adam. On CUDA where there is one. Prints one JSON line; `later` steps repeat the first one's batch.
On a CPU shares are of CPU seconds, so that programs beside it do not count; `wall_seconds` are what a clock shows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt.data.manifest import shard_name, write_manifest
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter
from opt.data.tokenizer import SPECIALS, Tokenizer
from opt.systems.opt import OPT, paper, small, tiny
from opt.systems.system import DataFacts, Preset
from pretrain.estimate import listed, measured_product, work
from pretrain.run import facts
from pretrain.trainer import Trainer

REGIONS, REGION_WIDTH, CLASSES, SPEECH_WIDTH, CODES = 100, 2048, 1600, 768, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_240, help="encoder tokens of a batch with nothing left out")
    parser.add_argument("--later", type=int, default=3, help="steps after the first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(Path(name), arguments.tokens, arguments.later)))


def measure(folder: Path, tokens: int, later: int) -> dict[str, object]:
    """Everything that the JSON line says."""
    preset, reader, words = paper(), made_up(folder), vocabulary(folder, paper().vocabulary_size)
    torch.manual_seed(0)
    system = OPT(preset.model, words, facts(reader.manifest))
    loop = preset.loop.__class__(steps=preset.loop.steps, batch_tokens=tokens, workers=0)
    trainer = Trainer(system, reader, folder / "run", loop, preset.optim)
    first = [batch for (batch,), _ in islice(trainer.loader(), 6)]
    full = [batch for batch in first if all(float(count) > 0 for count in batch.counts.values())]
    batch = max(full, key=lambda batch: batch.tokens).to(trainer.device)  # an epoch's last batch is smaller
    before = memory(trainer.device)
    losses, seconds, wall = [], [], []
    for _ in range(1 + later):
        began = time.perf_counter()
        duration, step = timed(lambda: trainer.train_step([batch]), trainer.device)
        losses.append(round(float(step.losses[0]), 3))
        seconds.append(round(duration, 3))
        wall.append(round(time.perf_counter() - began, 3))
    typical, matmul = float(np.median(seconds[1:])), measured_product(trainer.device, torch.bfloat16)
    operations = work(system, batch, trainer.bfloat16, trainer.device).flops
    cuda = trainer.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    peak = listed(device)
    return {
        "device": device, "torch": torch.__version__, "precision": "bfloat16" if trainer.bfloat16 else "float32",
        "parameters": parameters(system), "small_parameters": total(small()), "tiny_parameters": total(tiny()),
        "budget_tokens": tokens, "rows": len(batch.keys), "tokens": batch.tokens,
        "encoder_tokens": len(batch.views["encoder"].gather),
        "written_tokens": {name: len(writing.ids) for name, writing in batch.writings.items()},
        "first_seconds": seconds[0], "later_seconds": seconds[1:], "wall_seconds": wall,
        "tokens_per_second": round(batch.tokens / typical, 1), "losses": losses,
        "memory_before_step_GiB": before, "peak_memory_GiB": memory(trainer.device),
        "tflop": round(operations / 1e12, 3),
        "tflops": round(operations / typical / 1e12, 4), "matmul_tflops": round(matmul / 1e12, 4),
        "share_of_matmul": round(operations / typical / matmul, 3),
        "share_of_peak": round(operations / typical / peak, 3) if peak else None,
    }


def made_up(folder: Path) -> ShardReader:
    """64 samples of the paper's sizes, of random numbers."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, shard_name(0)) as shard:
        for number in range(64):
            boxes = np.sort(rng.random((REGIONS, 2, 2), np.float32), axis=1).reshape(-1, 4)
            picture = Picture(
                640, 480, regions=rng.normal(size=(REGIONS, REGION_WIDTH)).astype(np.float16), boxes=boxes,
                classes=rng.integers(CLASSES, size=REGIONS).astype(np.int16), scores=np.full(REGIONS, 0.9, np.float32),
                codes=rng.integers(CODES, size=(8, 8)).astype(np.int16),
            )
            caption = " ".join(f"w{word}" for word in rng.integers(20_000, size=rng.integers(40, 81)))
            speech = rng.normal(size=(rng.integers(128, 257), SPEECH_WIDTH)).astype(np.float16)
            shard.write(Record(f"sample{number}", (picture,), (Narration("0", caption, speech, 7.0, len(speech) / 7),)))
    write_manifest(folder, [shard_name(0)], {}, tuple(f"class{number}" for number in range(CLASSES)), CODES)
    return ShardReader(folder)


def vocabulary(folder: Path, size: int) -> Tokenizer:
    """Words w0, w1, ... and the special tokens: `size` in all."""
    words = [*SPECIALS, *(f"w{number}" for number in range(size - len(SPECIALS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer.from_vocab(folder / "vocab.txt")


def parameters(system: OPT) -> dict[str, int]:
    """Numbers of parameters by part, and in all. Word vectors are the text embedder's; head and decoder share them."""
    parts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in system.named_children()}
    return {**parts, "total": sum(parameter.numel() for parameter in system.parameters())}


def total(preset: Preset) -> int:
    """Parameters of a preset on the same features, with the largest vocabulary it trains."""
    with tempfile.TemporaryDirectory() as name, torch.device("meta"):
        words = vocabulary(Path(name), preset.vocabulary_size)
        classes = tuple(f"class{number}" for number in range(CLASSES))
        return parameters(OPT(preset.model, words, DataFacts(REGION_WIDTH, classes, SPEECH_WIDTH, 7.0, CODES)))["total"]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and what it returned: seconds of the clock on CUDA, of the process on a CPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, result


def memory(device: torch.device) -> float:
    """The most held so far, GiB: allocated on CUDA, resident in the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
