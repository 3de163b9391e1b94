"""Shards measured: int8 features against float16, and which pictures `opt shards dedup` takes for copies.

    python benchmarks/shards.py features
    python benchmarks/shards.py copies --pictures FOLDER
    python benchmarks/shards.py scenes
    python benchmarks/shards.py search

features: bytes and records read a second, 36 regions x 1024 and 256 frames x 768 a record.
copies: of the pictures below FOLDER, changed as pictures on the web are and then stored as `opt extract` stores them,
    the share that is found at each --distance, and the pairs of different pictures that would be taken for copies.
scenes: the same pairs among spoken scenes, which share their grounds.
search: seconds and memory of a million pictures against 5,000. Each prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from feature_extract.media import STORED_QUALITY, STORED_SHORT_SIDE
from feature_extract.sources.spoken_scenes import draw
from opt.data.manifest import shard_name, write_manifest
from opt.data.near_copies import FINER, HASHES, find_copies, picture_hash
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter

DISTANCES = (8, 10, 12, 14)
RECORDS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("features", "copies", "scenes", "search"))
    parser.add_argument("--pictures", type=Path, help="folder searched for .jpg files, for copies")
    parser.add_argument("--number", type=int, default=300, help="pictures that are changed, for copies")
    given = parser.parse_args()
    if given.what == "copies" and given.pictures is None:
        parser.error("copies needs --pictures FOLDER")
    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "features": features, "scenes": scenes, "search": search,
        "copies": lambda: copies(given.pictures, given.number),
    }  # fmt: skip
    print(json.dumps(answers[given.what]()))


def features() -> dict[str, Any]:
    """Bytes a record and records a second, warm, the two storages in turn."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = {}
        for storage in ("float16", "int8"):
            with ShardWriter(Path(folder) / storage, shard_name(0), int8=storage == "int8") as shard:
                for number in range(RECORDS):
                    shard.write(_record(f"k{number}", rng))
            write_manifest(Path(folder) / storage, [shard_name(0)], {}, (), 0)
            readers[storage] = ShardReader(Path(folder) / storage)
        rates: dict[str, list[float]] = {storage: [] for storage in readers}
        for _ in range(10):
            for storage, reader in readers.items():
                began = time.perf_counter()
                for number in range(RECORDS):
                    reader.sample(number)
                rates[storage].append(RECORDS / (time.perf_counter() - began))
        for storage, reader in readers.items():
            size = reader.manifest.shards[0].bytes // RECORDS
            made |= {f"{storage}_bytes": size, f"{storage}_records_a_second": round(statistics.median(rates[storage]))}
    return made


def copies(folder: Path, number: int) -> dict[str, Any]:
    """Share of changed pictures that are found, by change and distance; different pictures taken for copies."""
    paths = sorted(folder.rglob("*.jpg"))
    random.Random(0).shuffle(paths)
    changed: dict[str, list[list[bool]]] = {name: [] for name in CHANGES}
    table = np.zeros(len(paths), HASHES)
    for place, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        table[place] = (place, *picture_hash(_stored(image)))
        if place < number:
            for name, change in CHANGES.items():
                other = np.array([(0, *picture_hash(_stored(change(image))))], HASHES)
                one = table[place : place + 1]
                changed[name].append([bool(len(find_copies(other, one, distance).picture)) for distance in DISTANCES])
    table = table[np.unique(table["pixels"], return_index=True)[1]]
    return {
        "pictures": len(table), "distances": DISTANCES,
        "found": {name: np.mean(hits, axis=0).round(3).tolist() for name, hits in changed.items()},
        **_taken_for_copies(table),
    }  # fmt: skip


def scenes(number: int = 2000) -> dict[str, Any]:
    """Pairs of different scenes taken for copies."""
    hashes = [(place, *picture_hash(_stored(draw(0, place).picture()))) for place in range(number)]
    return {"scenes": number, "distances": DISTANCES, **_taken_for_copies(np.array(hashes, HASHES))}


def search(pictures: int = 1_000_000, tests: int = 5_000) -> dict[str, Any]:
    """Seconds for every pair of made-up hashes, and the memory it takes beyond the tables."""
    rng = np.random.default_rng(0)
    tables = []
    for count in (pictures, tests):
        tables.append(np.frombuffer(rng.bytes(count * HASHES.itemsize), np.uint8).copy().view(HASHES))
        tables[-1]["readable"] = True
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    find_copies(tables[0], tables[1], 12)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "pictures": pictures, "tests": tests, "seconds": round(seconds, 1), "more_memory_mb": (after - before) // 1024,
    }  # fmt: skip


def _taken_for_copies(table: np.ndarray) -> dict[str, Any]:
    """Pairs of a table whose pictures all differ: how many `find_copies` takes, and how many the coarse hash would."""
    first, second = np.triu_indices(len(table), 1)
    coarse = np.bitwise_count(table["coarse"][first] ^ table["coarse"][second])
    near = np.flatnonzero(coarse <= max(DISTANCES))
    fine = np.bitwise_count(table["fine"][first[near]] ^ table["fine"][second[near]]).sum(1)
    both = [int(((coarse[near] <= distance) & (fine <= FINER * distance)).sum()) for distance in DISTANCES]
    alone = [int((coarse <= distance).sum()) for distance in DISTANCES]
    return {"different_pairs": len(first), "taken_for_copies": both, "by_the_coarse_hash_alone": alone}


def _record(key: str, rng: np.random.Generator) -> Record:
    regions, speech = (rng.standard_normal(shape).astype(np.float16) for shape in ((36, 1024), (256, 768)))
    boxes, scores = rng.random((36, 4), np.float32), rng.random(36, np.float32)
    picture = Picture(640, 480, regions, boxes, np.zeros(36, np.int16), scores)
    return Record(key, (picture,), (Narration("0", "A picture.", speech, 10.0, 25.6),))


def _stored(image: Image.Image) -> bytes:
    """The picture as `opt extract` stores it."""
    scale = STORED_SHORT_SIDE / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return _encoded(image, STORED_QUALITY)


def _encoded(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.open(io.BytesIO(_encoded(image, quality))).convert("RGB")


def _resized(short_side: int) -> Callable[[Image.Image], Image.Image]:
    def resize(image: Image.Image) -> Image.Image:
        scale = short_side / min(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)

    return resize


def _cropped(share: float, edges: int) -> Callable[[Image.Image], Image.Image]:
    """Without a share of width and height at 1 edge (the left) or at all 4."""

    def crop(image: Image.Image) -> Image.Image:
        x, y = round(image.width * share), round(image.height * share)
        return image.crop((x, y, image.width - x, image.height - y) if edges == 4 else (x, 0, *image.size))

    return crop


def _brightness(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 30": _jpeg(30),
    "JPEG quality 60": _jpeg(60),
    "JPEG quality 95": _jpeg(95),
    "short side 64": _resized(64),
    "short side 128": _resized(128),
    "short side 256": _resized(256),
    "2 % off one edge": _cropped(0.02, 1),
    "5 % off one edge": _cropped(0.05, 1),
    "2 % off each edge": _cropped(0.02, 4),
    "5 % off each edge": _cropped(0.05, 4),
    "brightness x 0.7": _brightness(0.7),
    "brightness x 1.3": _brightness(1.3),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}

if __name__ == "__main__":
    main()
