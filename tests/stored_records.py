"""Made-up records with every field, folders of them, and whether two records are the same: for tests of shards."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from opt.data.manifest import UNKNOWN, Origin, shard_name, write_manifest
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter

CLASSES, ATTRIBUTES, CODEBOOK, SPEECH_CODEBOOKS = ("a", "b", "c", "d", "e"), ("red", "blue"), 32, (7, 9)


def full_picture(
    rng: np.random.Generator, regions: int = 3, jpeg: bytes | None = None, width: int = 8, grid: int = 8
) -> Picture:
    """A picture with all that can be stored of it."""
    return Picture(
        width=64,
        height=48,
        regions=rng.standard_normal((regions, width)).astype(np.float16),
        boxes=rng.random((regions, 4), np.float32),
        classes=rng.integers(5, size=regions).astype(np.int16),
        scores=rng.random(regions, np.float32),
        top_classes=rng.integers(5, size=(regions, 4)).astype(np.int16),
        top_scores=rng.random((regions, 4)).astype(np.float16),
        attributes=rng.integers(2, size=(regions, 2)).astype(np.int16),
        attribute_scores=rng.random((regions, 2)).astype(np.float16),
        codes=rng.integers(32, size=(grid, grid)).astype(np.int16),
        jpeg=jpeg,
    )


def full_narration(rng: np.random.Generator, number: int, frames: int = 5) -> Narration:
    """Words and sound, with the ids of two codebooks."""
    codes = np.stack([rng.integers(size, size=frames) for size in SPEECH_CODEBOOKS], axis=1).astype(np.int16)
    speech = rng.standard_normal((frames, 6)).astype(np.float16)
    return Narration(f"n{number}", f"A red cube, number {number}.", speech, 12.5, 0.08 * frames, codes)


def full_record(key: str, seed: int, pictures: int = 1, narrations: int = 1, jpeg: bool = True) -> Record:
    rng = np.random.default_rng(seed)
    return Record(
        key,
        tuple(full_picture(rng, 3 + n, noise_jpeg(seed + n) if jpeg else None) for n in range(pictures)),
        tuple(full_narration(rng, n, 5 + n) for n in range(narrations)),
    )


def noise_jpeg(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Soft blotches: unlike for every seed, and a photograph to a perceptual hash."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(256, size=(9, 12, 3)).astype(np.uint8))
    return encoded(image.resize(size, Image.Resampling.BICUBIC))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_folder(
    folder: Path, shards: list[list[Record]], int8: bool = False, extractors: dict | None = None,
    origins: tuple[Origin, ...] = (UNKNOWN,),
) -> ShardReader:
    """The records as a complete folder, a list of them a shard."""
    for number, records in enumerate(shards):
        with ShardWriter(folder, shard_name(number), int8=int8) as shard:
            for record in records:
                shard.write(record)
    made_by = extractors if extractors is not None else {"regions": {"weights": "made up"}}
    names = [shard_name(number) for number in range(len(shards))]
    write_manifest(folder, names, made_by, CLASSES, CODEBOOK, ATTRIBUTES, SPEECH_CODEBOOKS, origins)
    return ShardReader(folder)


def records_of(reader: ShardReader) -> list[Record]:
    """Every record once, in order, with its pictures."""
    firsts = np.flatnonzero(reader.column("narration") <= 0)
    return [reader.record(int(number), jpeg=True) for number in firsts]


def same(first: object, second: object) -> bool:
    """Equality through dataclasses, tuples and arrays, of dtypes too."""
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(same(getattr(first, n), getattr(second, n)) for n in names)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.dtype == second.dtype and np.array_equal(first, second)
    return first == second
