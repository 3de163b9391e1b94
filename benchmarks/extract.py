"""The extraction job against the bare networks, and against the loop that scripts of the field write.

    python benchmarks/extract.py [--real-samples 16] [--tiny-samples 600] [--networks both|real|tiny]

`pipeline_over_model`: real-size networks (Faster R-CNN ResNet-50-FPN v2 at its own 800 pixels, wav2vec 2.0 base, both
with random weights), samples a second of `opt extract` over those of the forward passes alone, on decoded inputs in
memory; both by two processes of one thread.
`over_plain_loop`: the embedded networks, samples a second of `opt extract` with two workers over those of a loop in one
process that decodes, forwards and saves one .npz a sample, on as many threads as make it fastest.

Rates are of steady work: from the first row done to the last, networks open before. Inputs are spoken scenes, for the
real sizes drawn up to 640 x 480 pixels as photos of the field are. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from feature_extract.audio import AudioSettings
from feature_extract.extractors import Extractors, open_extractors
from feature_extract.media import read_picture, read_recording
from feature_extract.plan import open_plan
from feature_extract.regions import RegionSettings
from feature_extract.runners.local import LocalWorker
from feature_extract.runners.supervise import Limits, Supervisor, Tally
from feature_extract.sources.item import Item, NarrationItem
from feature_extract.sources.localized_narratives import Source
from feature_extract.work import Setup, WorkItem
from opt import cli

WORKERS = 2
SHARD = 4
PHOTO = (640, 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-samples", type=int, default=16)
    parser.add_argument("--tiny-samples", type=int, default=600)
    parser.add_argument("--networks", choices=("both", "real", "tiny"), default="both")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.networks != "tiny":
            figures |= real_sizes(Path(folder) / "real", given.real_samples)
        if given.networks != "real":
            figures |= embedded(Path(folder) / "tiny", given.tiny_samples)
    print(json.dumps(figures))


def real_sizes(folder: Path, samples: int) -> dict[str, Any]:
    """`pipeline_over_model` and the two rates it is made of."""
    words = random_networks(folder)
    source = corpus(folder / "corpus", samples, PHOTO)
    extractors = open_extractors(*words, "none", RegionSettings(), AudioSettings(), "cpu")
    pipeline = job_rate(folder, source, extractors, min(SHARD, samples // (2 * WORKERS)))
    model = bare_rate(extractors.describe(), items(source, folder / "plan"))
    return {"pipeline_over_model": round(pipeline / model, 3), "real_pipeline_per_second": round(pipeline, 4),
            "real_model_per_second": round(model, 4), "real_samples": samples}


def embedded(folder: Path, samples: int) -> dict[str, Any]:
    """`over_plain_loop` and the rates it is made of."""
    source = corpus(folder / "corpus", samples)
    extractors = open_extractors("tiny", "tiny", "tiny", RegionSettings(), AudioSettings(), "cpu")
    rows = items(source, folder / "plan")
    loops = {threads: plain_loop_rate(extractors, rows, folder / f"npz{threads}", threads) for threads in (1, 2)}
    pipeline = job_rate(folder, source, extractors, 25)
    return {"over_plain_loop": round(pipeline / max(loops.values()), 3), "tiny_pipeline_per_second": round(pipeline, 2),
            **{f"plain_loop_per_second.{threads}_threads": round(rate, 2) for threads, rate in loops.items()},
            "tiny_samples": samples}


def corpus(folder: Path, samples: int, size: tuple[int, int] | None = None) -> Source:
    """Spoken scenes; pictures drawn up to `size`."""
    if cli.main(["scenes", "--out", str(folder), "--train", str(samples), "--val", "0", "--test", "0"]):
        raise SystemExit(1)
    if size is not None:
        for path in (folder / "images").iterdir():
            Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path, quality=92)
    return Source(folder, "train")


def random_networks(folder: Path) -> tuple[str, str]:
    """Files of real-size networks with random weights, as words of the command line."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    torch.save(fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict(), folder / "detector.pt")
    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(folder / "speech")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "speech")
    return (f"torchvision_detector:fasterrcnn_resnet50_fpn_v2:{folder / 'detector.pt'}",
            f"transformers_speech:{folder / 'speech'}")


def items(source: Source, folder: Path) -> list[Item]:
    """The rows, with whole paths."""
    plan = open_plan(source, "localized_narratives", folder, lambda sha256: None)
    found = [row.item for row in plan.rows(0, plan.size) if isinstance(row.item, Item)]
    return [
        Item(item.key, tuple(str(source.root / path) for path in item.pictures),
             tuple(NarrationItem(told.narration_id, told.caption, str(source.root / (told.recording or "")))
                   for told in item.narrations))
        for item in found
    ]


class Clock:
    """Stands where a progress bar stands, and notes when each row was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.times += [time.perf_counter()] * count

    def rate(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def job_rate(folder: Path, source: Source, extractors: Extractors, shard: int) -> float:
    """Rows a second of the job, by the supervisor and the processes that `opt extract` uses."""
    plan = open_plan(source, "localized_narratives", folder / "out", lambda sha256: None)
    setup = Setup(folder / "out", plan, source.root, extractors.describe(), "cpu", True, False)
    work = [WorkItem(f"{start:05d}", start, min(start + shard, plan.size)) for start in range(0, plan.size, shard)]
    clock: Any = Clock()
    Supervisor(lambda number: LocalWorker(setup, number), WORKERS, Limits(600, None), Tally(), clock).run(work)
    return clock.rate()


def bare_rate(descriptions: dict[str, Any], rows: list[Item]) -> float:
    """Rows a second of the forward passes alone, by as many processes of one thread."""
    context = multiprocessing.get_context("spawn")
    times = context.Queue()
    start = context.Barrier(WORKERS)
    shares = [context.Process(target=_forward, args=(descriptions, rows[number::WORKERS], start, times))
              for number in range(WORKERS)]
    for process in shares:
        process.start()
    clock = Clock()
    for _ in rows:
        times.get()
        clock.advance()
    for process in shares:
        process.join()
    return clock.rate()


def _forward(descriptions: dict[str, Any], rows: list[Item], start: Any, times: Any) -> None:
    """One share: everything decoded beforehand, then nothing but the networks."""
    from torchvision.transforms.functional import pil_to_tensor

    from feature_extract.extractors import reopen

    torch.set_num_threads(1)
    extractors: Any = reopen(descriptions, "cpu")
    inputs = [(pil_to_tensor(read_picture(Path(row.pictures[0])).image).float() / 255,
               [torch.from_numpy(read_recording(Path(told.recording or "")))[None] for told in row.narrations])
              for row in rows]
    start.wait()
    with torch.inference_mode():
        for pixels, waveforms in inputs:
            extractors.regions.detector([pixels])
            for waveform in waveforms:
                extractors.audio.network(waveform)
            times.put(None)


def plain_loop_rate(extractors: Any, rows: list[Item], out: Path, threads: int) -> float:
    """Rows a second of: decode, forward, save; in one process of so many threads."""
    torch.set_num_threads(threads)
    out.mkdir()
    clock = Clock()
    for row in rows:
        picture = Image.open(row.pictures[0]).convert("RGB")
        regions, codes = extractors.regions(picture), extractors.codes(picture)
        arrays = {"features": regions.features, "boxes": regions.boxes, "classes": regions.classes,
                  "scores": regions.scores, "codes": codes}
        for number, told in enumerate(row.narrations):
            arrays[f"speech{number}"] = extractors.audio(read_recording(Path(told.recording or ""))).features
        np.savez(out / f"{row.key}.npz", **arrays)
        clock.advance()
    return clock.rate()


if __name__ == "__main__":
    main()
