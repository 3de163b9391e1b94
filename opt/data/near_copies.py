"""Near copies of pictures: perceptual hashes, and the search among them.

    jpeg --picture_hash--> Hashes, 49 bytes a picture --find_copies--> which test picture each one copies, if any

The hash is the sign of the lowest 8 x 8 frequencies of the picture in grey (ImageHash's phash, 64 bits); two pictures
are candidates when at most `distance` of those bits differ. A candidate is a copy when no larger share differs of the
lowest 16 x 16 frequencies (256 bits): pictures that share a ground, a sky or a page agree in the first and not in the
second. docs/shards.md has the measurement. Shape legend: P pictures, Q test pictures.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

HASHES = np.dtype(
    [
        ("place", "<u4"),  # of the record in its shard
        ("readable", "?"),  # False: no decoder reads it, and the rest is 0
        ("pixels", "<u8"),  # BLAKE2b of size and pixels: equal for exact copies
        ("coarse", "<u8"),  # 8 x 8 frequencies
        ("fine", "<u8", (4,)),  # 16 x 16 frequencies
    ]
)
"""One row a picture."""
FINER = 4
"""Bits of the fine hash for each bit of the coarse one."""
PAIRS = 1 << 18
"""Pairs compared at once: their distances fit a core's cache."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Copies(NamedTuple):
    """Pictures that copy a test picture, (N,) each.

    picture, test: places in the two tables. distance: bits of 64 in which the hashes differ. exact: equal pixels.
    """

    picture: np.ndarray
    test: np.ndarray
    distance: np.ndarray
    exact: np.ndarray


def picture_hash(jpeg: bytes) -> tuple[bool, int, int, tuple[int, ...]]:
    """`readable` and the hashes of an encoded picture, as in HASHES."""
    import imagehash

    try:
        with Image.open(io.BytesIO(jpeg)) as opened:
            image = opened.convert("RGB")
    except Exception:  # a decoder may fail in any way on a damaged file
        return False, 0, 0, (0, 0, 0, 0)
    pixels = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=8).digest()
    grey = image.convert("L")
    coarse, fine = (np.packbits(imagehash.phash(grey, size).hash).view("<u8") for size in (8, 16))
    return True, int.from_bytes(pixels, "little"), int(coarse[0]), tuple(fine.tolist())


def find_copies(pictures_P: np.ndarray, tests_Q: np.ndarray, distance: int) -> Copies:
    """Of every picture that copies a test picture, the nearest of those. Tables as in HASHES.

    Compares every pair, PAIRS at once: memory does not grow with either table.
    """
    found = []
    tests_coarse, tests_fine = np.ascontiguousarray(tests_Q["coarse"]), np.ascontiguousarray(tests_Q["fine"])
    rows = max(1, PAIRS // max(1, len(tests_Q)))
    for start in range(0, len(pictures_P), rows):
        coarse = np.ascontiguousarray(pictures_P["coarse"][start : start + rows])
        apart = np.bitwise_count(coarse[:, None] ^ tests_coarse)
        picture, test = np.nonzero(apart <= distance)
        if not len(picture):
            continue
        fine = np.bitwise_count(pictures_P["fine"][start + picture] ^ tests_fine[test]).sum(1, dtype=np.int64)
        near = fine <= FINER * distance
        found.append(np.stack([start + picture, test, apart[picture, test], fine], axis=1)[near])
    pairs = np.concatenate([np.zeros((0, 4), np.int64), *found])
    readable = pictures_P["readable"][pairs[:, 0]] & tests_Q["readable"][pairs[:, 1]]
    pairs = pairs[readable]
    exact = pictures_P["pixels"][pairs[:, 0]] == tests_Q["pixels"][pairs[:, 1]]
    order = np.lexsort((pairs[:, 1], pairs[:, 3], ~exact, pairs[:, 0]))
    nearest = order[np.unique(pairs[order, 0], return_index=True)[1]]
    chosen = pairs[nearest]
    return Copies(chosen[:, 0], chosen[:, 1], chosen[:, 2], exact[nearest])
