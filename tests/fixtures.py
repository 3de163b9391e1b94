"""Made-up samples and shards whose three modalities agree, for tests of systems, trainer and evaluation."""

from functools import cache
from pathlib import Path

import numpy as np

from opt.data.manifest import shard_name, write_manifest
from opt.data.record import Narration, Picture, Record, Sample
from opt.data.shards import ShardReader, ShardWriter
from opt.data.tokenizer import Tokenizer
from opt.systems.system import DataFacts

WORDS = ["red", "blue", "green", "circle", "square", "star"]
FACTS = DataFacts(region_width=12, region_classes=tuple(WORDS), speech_width=10, frame_rate=10.0, codebook=16,
                  speech_codebooks=(12,), codes_grid=8)


@cache
def tokenizer() -> Tokenizer:
    """Whole words only."""
    return Tokenizer.train([" ".join(WORDS), "a and the"] * 4, 60)


def fake_sample(number: int, regions: bool = True, caption: bool = True, speech: bool = True) -> Sample:
    """Sample `number`: its words choose its regions, its frames, and the codes of both."""
    rng = np.random.default_rng(number)
    words = rng.integers(len(WORDS), size=int(rng.integers(2, 6)))
    table = np.random.default_rng(0).normal(size=(len(WORDS), 22)).astype(np.float32)
    noise = rng.normal(scale=0.1, size=(len(words), 22)).astype(np.float32)
    corners = np.sort(rng.random((len(words), 2, 2), np.float32), axis=1).reshape(-1, 4)
    picture = Picture(
        64, 64, regions=table[words, :12].astype(np.float16) + noise[:, :12].astype(np.float16), boxes=corners,
        classes=words.astype(np.int16), scores=np.full(len(words), 0.9, np.float32),
        codes=np.resize(words, (8, 8)).astype(np.int16),
    )
    frames = np.repeat((table[words, 12:] + noise[:, 12:]).astype(np.float16), 2, axis=0)
    return Sample(
        key=f"sample{number}", pictures=(picture,) if regions else (), narration=0, narration_id="0",
        caption=" ".join(WORDS[word] for word in words) if caption else None, speech=frames if speech else None,
        speech_codes=np.repeat(words, 2)[:, None].astype(np.int16) if speech else None,
    )


def fake_shards(folder: Path, samples: list[Sample], shard_size: int = 16) -> ShardReader:
    """The samples as a folder of shards."""
    shards = range(0, len(samples), shard_size)
    for number, start in enumerate(shards):
        with ShardWriter(folder, shard_name(number)) as shard:
            for sample in samples[start : start + shard_size]:
                seconds = len(sample.speech) / FACTS.frame_rate if sample.speech is not None else 0.0
                narration = Narration("0", sample.caption, sample.speech, FACTS.frame_rate if seconds else 0.0, seconds,
                                      None if sample.speech is None else sample.speech_codes)
                told = sample.caption is not None or sample.speech is not None
                shard.write(Record(sample.key, sample.pictures, (narration,) if told else ()))
    names = [shard_name(number) for number in range(len(shards))]
    write_manifest(folder, names, {"regions": {"backend": "made up"}}, FACTS.region_classes, FACTS.codebook,
                   speech_codebooks=FACTS.speech_codebooks)
    return ShardReader(folder)
