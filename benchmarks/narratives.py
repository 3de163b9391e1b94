"""Made-up samples with the shapes of the paper's features and the lengths of spoken descriptions of pictures.

Lengths are drawn as follows; what they hold is random.

    words     median 36, log-normal with deviation 0.4, from 20 to 80 (Localized Narratives: 36 words on average)
    frames    2.5 to 4.5 a word at 7 a second, up to 256: 1.6 to 2.8 words a second
    regions   median 40, log-normal with deviation 0.5, from 10 to 100 (detections above a score, at most 100)

Each region has 2,048 numbers and one of 1,600 classes, each frame 768 numbers, each picture 8 x 8 of 8,192 codes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from paper_step import CLASSES, CODES, REGION_WIDTH, SPEECH_WIDTH

from opt.data.manifest import shard_name, write_manifest
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter

FRAME_RATE = 7.0


def write_narratives(folder: Path, samples: int) -> ShardReader:
    """One shard of `samples` spoken descriptions."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, shard_name(0)) as shard:
        for number in range(samples):
            shard.write(_record(f"sample{number}", rng))
    write_manifest(folder, [shard_name(0)], {}, tuple(f"class{number}" for number in range(CLASSES)), CODES)
    return ShardReader(folder)


def _record(key: str, rng: np.random.Generator) -> Record:
    words = int(np.clip(rng.lognormal(np.log(36), 0.4), 20, 80))
    regions = int(np.clip(rng.lognormal(np.log(40), 0.5), 10, 100))
    frames = min(256, int(words * rng.uniform(2.5, 4.5)))
    picture = Picture(
        640, 480, regions=rng.normal(size=(regions, REGION_WIDTH)).astype(np.float16),
        boxes=np.sort(rng.random((regions, 2, 2), np.float32), axis=1).reshape(-1, 4),
        classes=rng.integers(CLASSES, size=regions).astype(np.int16), scores=np.full(regions, 0.9, np.float32),
        codes=rng.integers(CODES, size=(8, 8)).astype(np.int16),
    )
    caption = " ".join(f"w{word}" for word in rng.integers(20_000, size=words))
    speech = rng.normal(size=(frames, SPEECH_WIDTH)).astype(np.float16)
    return Record(key, (picture,), (Narration("0", caption, speech, FRAME_RATE, frames / FRAME_RATE),))
