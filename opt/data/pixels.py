"""Pixels: a stored JPEG to the patches that a vision transformer reads, and where each lies among learned positions.

    JPEG --decode, crop, resize--> (h p, w p, 3) uint8 --cut--> patches (P, 3 p p), P = h w, row by row
    grid (h, w) onto the table's grid (g, g) --> rows of the table and their shares: position of a patch

Runs in loader workers on numpy arrays; the pixels are normalised on the device.
Shape legend: P patches, K rows of the table that make a position.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from opt.config import UserError
from opt.data.record import Sample

Fit = Literal["squeeze", "crop", "keep"]
LONGEST_SHAPE = 4
"""A picture longer than so many times its width is cut before it is resized."""


@dataclass(frozen=True)
class Sight:
    """How a picture becomes patches."""

    size: int = 224
    """Side of the square that pictures become, in pixels; the shorter side with fit keep."""
    patch: int = 16
    """Side of a patch in pixels."""
    fit: Fit = "squeeze"
    """squeeze: to a square, whatever the shape (ALBEF, BLIP). crop: the shorter side, then the middle square (CLIP,
    CoCa). keep: the shape is kept, sides rounded down to whole patches, the longer at most `longest` (ViLT)."""
    longest: int = 0
    """fit keep: longest side in pixels."""
    least_area: float = 1.0
    """Training sees a random part of each picture, at least this share of its area; 1: all of it. Nothing is ever
    flipped: captions tell left from right."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the pixels in [0, 1], red, green, blue (CLIP's, BLIP's and ALBEF's)."""
    deviation: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the pixels."""

    @property
    def grid(self) -> int:
        """Rows, and columns, of patches in a square."""
        return self.size // self.patch

    @property
    def most(self) -> int:
        """Most patches that a picture becomes."""
        longest = self.longest if self.fit == "keep" else self.size
        return self.grid * (longest // self.patch)

    @property
    def wrong(self) -> list[str]:
        """What is out of range, in words."""
        rules = (
            (f"patch {self.patch} must be at least 1, and fit into size {self.size}", 1 <= self.patch <= self.size),
            (f"size {self.size} must be a multiple of patch {self.patch}", self.size % max(self.patch, 1) == 0),
            (f"least-area {self.least_area} must be above 0 and at most 1", 0 < self.least_area <= 1),
            (f"mean {self.mean} and deviation {self.deviation} must be three finite numbers each, deviations above 0",
             len(self.mean) == len(self.deviation) == 3 and all(map(math.isfinite, (*self.mean, *self.deviation)))
             and min(self.deviation) > 0),
            (f"longest {self.longest} must be at least size {self.size} with fit keep, and 0 otherwise",
             self.longest >= self.size if self.fit == "keep" else self.longest == 0),
        )
        return [said for said, kept in rules if not kept]


@dataclass(frozen=True)
class Patches:
    """pixels (P, 3 p p) uint8: red, green, blue, each row by row. places (P, K) int64, shares (P, K) float32: rows of
    the position table (row 0 is the class token's) and their weights."""

    pixels: np.ndarray
    places: np.ndarray
    shares: np.ndarray


def see(jpeg: bytes, sight: Sight, rng: np.random.Generator | None = None) -> Patches:
    """The patches of a picture. rng: draws the part that training sees. Raises BadPicture."""
    pixels_hwc = picture(jpeg, sight, rng)
    places, shares = positions(pixels_hwc.shape[0] // sight.patch, pixels_hwc.shape[1] // sight.patch, sight.grid,
                               4 if sight.fit == "keep" else 1)
    return Patches(cut(pixels_hwc, sight.patch), places, shares)


def picture(jpeg: bytes, sight: Sight, rng: np.random.Generator | None = None) -> np.ndarray:
    """Decoded and resized: uint8 (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as opened:
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise BadPicture("it is no whole JPEG") from error
    if rng is not None and sight.least_area < 1:
        image = image.crop(_part(*image.size, sight.least_area, rng))
    if sight.fit == "squeeze":
        return _resized(image, sight.size, sight.size)
    if sight.fit == "crop":
        image = _middle(image)
    width, height = image.size
    scale = sight.size / min(width, height)
    if sight.fit == "keep":
        scale = min(scale, sight.longest / max(width, height))
        sides = (max(int(side * scale + 0.5) // sight.patch, 1) * sight.patch for side in (width, height))
        return _resized(image, *sides)
    width, height = (sight.size * side // min(image.size) for side in (width, height))
    pixels_hwc = _resized(image, width, height)
    top, left = (height - sight.size) // 2, (width - sight.size) // 2
    return pixels_hwc[top : top + sight.size, left : left + sight.size]


def _middle(image: Image.Image) -> Image.Image:
    """Without the ends of a picture more than LONGEST_SHAPE times as long as wide, which no middle square shows."""
    width, height = image.size
    wide, high = min(width, LONGEST_SHAPE * height), min(height, LONGEST_SHAPE * width)
    left, top = (width - wide) // 2, (height - high) // 2
    return image if image.size == (wide, high) else image.crop((left, top, left + wide, top + high))


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _part(width: int, height: int, least: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random rectangle of at least `least` of the area, sides of 3:4 to 4:3 of the picture's shape: left, top, right,
    bottom (the random resized crop of Inception)."""
    for _ in range(10):
        area, shape = rng.uniform(least, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        wide, high = round(width * (area * shape) ** 0.5), round(height * (area / shape) ** 0.5)
        if 0 < wide <= width and 0 < high <= height:
            left, top = rng.integers(width - wide + 1), rng.integers(height - high + 1)
            return int(left), int(top), int(left) + wide, int(top) + high
    return 0, 0, width, height


def cut(pixels_hwc: np.ndarray, patch: int) -> np.ndarray:
    """(h p, w p, 3) -> (h w, 3 p p): patches row by row, in each all of red, then green, then blue."""
    rows, columns = pixels_hwc.shape[0] // patch, pixels_hwc.shape[1] // patch
    grid = pixels_hwc.reshape(rows, patch, columns, patch, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3)).reshape(rows * columns, 3 * patch * patch)


@lru_cache(maxsize=256)
def positions(rows: int, columns: int, grid: int, most: Literal[1, 4]) -> tuple[np.ndarray, np.ndarray]:
    """Where the patches of a (rows, columns) picture lie in a table of 1 + grid x grid positions: places (P, most)
    int64, shares (P, most) float32.

    most 1: the picture has the table's grid. most 4: bilinear, corners on corners (ViLT's interpolation).
    """
    if most == 1:
        if (rows, columns) != (grid, grid):
            raise ValueError(f"a picture of {rows} x {columns} patches has no places of its own in {grid} x {grid}")
        return 1 + np.arange(grid * grid)[:, None], np.ones((grid * grid, 1), np.float32)
    lower_y, upper_y, share_y = _between(rows, grid)
    lower_x, upper_x, share_x = _between(columns, grid)
    places = [1 + y[:, None] * grid + x[None, :] for y in (lower_y, upper_y) for x in (lower_x, upper_x)]
    shares = [y[:, None] * x[None, :] for y in (1 - share_y, share_y) for x in (1 - share_x, share_x)]
    return (np.stack([each.ravel() for each in places], axis=1),
            np.stack([each.ravel() for each in shares], axis=1).astype(np.float32))


def _between(count: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `count` steps from the first place to the last of `grid`: the places before and after, and how far
    between them it is."""
    exact = np.arange(count) * ((grid - 1) / max(count - 1, 1))
    lower = np.minimum(exact.astype(np.int64), grid - 1)
    return lower, np.minimum(lower + 1, grid - 1), exact - lower


def see_all(sample: Sample, sight: Sight, rng: np.random.Generator | None = None, most: int | None = None
            ) -> list[Patches]:
    """The patches of a sample's stored pictures, at most so many. Raises UserError that names the sample where one was
    not stored, or cannot be read."""
    try:
        return [see(jpeg, sight, rng) for jpeg in jpegs(sample)[:most]]
    except BadPicture as error:
        raise UserError(f"sample {sample.key!r}: its stored picture cannot be read ({error}); extract its source "
                        "again, or leave it out") from error


class BadPicture(ValueError):
    """A JPEG that cannot be decoded."""


def jpegs(sample: Sample) -> list[bytes]:
    """The stored pictures of a sample, in order. Raises UserError where one of its pictures was not stored."""
    found = [picture.jpeg for picture in sample.pictures]
    if any(jpeg is None for jpeg in found):
        raise UserError(f"sample {sample.key!r} holds no stored picture, which this model sees; give shards of records "
                        "with pictures, extracted without --no-jpeg")
    return [jpeg for jpeg in found if jpeg is not None]
