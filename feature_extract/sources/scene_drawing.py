"""The pictures of spoken scenes: objects laid out at random and painted with Pillow.

    rng --lay_out--> objects (far to near), hidden fractions --paint--> 128 x 128 picture

Lengths are pixels of the 128 x 128 picture unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from feature_extract.sources.scene_grounds import paint_ground

SIDE = 128
SUPERSAMPLING = 3

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (244, 140, 30), "yellow": (246, 220, 50), "green": (40, 160, 70),
    "blue": (40, 90, 210), "purple": (140, 60, 180), "white": (245, 245, 245), "black": (28, 28, 30),
}  # fmt: skip
SIZES: dict[str, tuple[float, float]] = {"small": (17, 22), "medium": (29, 36), "large": (45, 54)}
TEXTURES = ("plain", "striped", "dotted")


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon that points upwards; with `inner` < 1 a star of that inner radius."""
    steps = corners * (1 if inner == 1.0 else 2)
    radii = [1.0 if step % 2 == 0 or inner == 1.0 else inner for step in range(steps)]
    angles = [2 * math.pi * step / steps - math.pi / 2 for step in range(steps)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * step / 40 for step in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


_ARM = 0.34
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(40),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _regular(3),
    "star": _regular(5, 0.42),
    "ring": _regular(40),
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    "heart": _heart(),
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
}  # fmt: skip
"""Outlines within [-1, 1], y downwards. A ring is a circle with a hole of half its radius."""

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""The 64 names of what an object is, in the order of the region network's classes (without its background)."""


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where its middle lies, how much of it nearer objects or the picture's edge hide."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    diameter: float
    turn: float
    tint: tuple[int, int, int]
    unit: int
    """Number of the group of equal objects it belongs to ("two red circles" are one unit)."""
    hidden: float = 0.0

    @property
    def label(self) -> str:
        """Colour and shape, one of `CLASSES`."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1 y1 x2 y2 of the part within the picture, in [0, 1]."""
        points = self.outline()
        sides = (points[:, 0].min(), points[:, 1].min(), points[:, 0].max(), points[:, 1].max())
        return tuple(round(min(max(float(side) / SIDE, 0.0), 1.0), 4) for side in sides)  # type: ignore[return-value]

    def outline(self) -> np.ndarray:
        """The outline's corners (points, 2) as x, y."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return np.array([self.x, self.y]) + self.diameter / 2 * np.array(SHAPES[self.shape]) @ np.array(
            [[cos, sin], [-sin, cos]]
        )


def lay_out(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One to four objects, far to near, no more than 60 % of any hidden."""
    while True:
        things = _try_lay_out(rng)
        if things is not None:
            return things


def _try_lay_out(rng: np.random.Generator) -> tuple[Thing, ...] | None:
    groups = [(1,), (1, 1), (2,), (1, 1, 1), (1, 2), (3,), (1, 1, 1, 1), (1, 1, 2), (2, 2)]
    counts = groups[rng.choice(len(groups), p=[0.10, 0.30, 0.05, 0.28, 0.08, 0.02, 0.10, 0.05, 0.02])]
    labels = rng.choice(len(CLASSES), size=len(counts), replace=False)
    size_shares = [0.3, 0.4, 0.3] if sum(counts) < 3 else [0.36, 0.46, 0.18]
    placed: list[Thing] = []
    for unit, (count, label) in enumerate(zip(counts, labels, strict=True)):
        color, shape = CLASSES[label].split()
        size = str(rng.choice(list(SIZES), p=size_shares))
        texture = str(rng.choice(TEXTURES, p=[0.5, 0.25, 0.25]))
        for _ in range(count):
            thing = Thing(
                shape, color, size, texture, 0, 0, unit=unit,
                diameter=float(rng.uniform(*SIZES[size])), turn=float(rng.uniform(-0.2, 0.2)),
                tint=_jitter(COLORS[color], rng),
            )  # fmt: skip
            spot = _find_spot(rng, thing, placed)
            if spot is None:
                return None
            placed.append(replace(thing, x=spot[0], y=spot[1]))
    return _with_hidden(placed)


def _jitter(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(color) + rng.integers(-14, 15, 3), 0, 255)
    return int(red), int(green), int(blue)


def _find_spot(rng: np.random.Generator, thing: Thing, placed: list[Thing]) -> tuple[float, float] | None:
    """A free place; sometimes one over the picture's edge or partly over a farther object, on purpose."""
    radius = thing.diameter / 2
    manner = rng.choice(["free", "edge", "overlap"], p=[0.78, 0.11, 0.11])
    for _ in range(40):
        x, y = (float(v) for v in rng.uniform(radius + 1, SIDE - radius - 1, 2))
        if manner == "edge":
            depth = float(rng.uniform(-0.3, 0.3)) * radius
            x, y = [(depth, y), (SIDE - depth, y), (x, depth), (x, SIDE - depth)][rng.integers(4)]
        if manner == "overlap" and placed:
            other = placed[rng.integers(len(placed))]
            angle, distance = rng.uniform(0, 2 * math.pi), 0.6 * (radius + other.diameter / 2)
            x, y = other.x + distance * math.cos(angle), other.y + distance * math.sin(angle)
            if not (radius < x < SIDE - radius and radius < y < SIDE - radius):
                continue
            others = [neighbour for neighbour in placed if neighbour is not other]
        else:
            others = placed
        if all(math.hypot(x - other.x, y - other.y) > 0.95 * (radius + other.diameter / 2) for other in others):
            return x, y
    return None


def _with_hidden(placed: list[Thing]) -> tuple[Thing, ...] | None:
    """The objects with their hidden fractions; None when one is hidden too much. Measured on a canvas with a margin."""
    margin, scale = 32, 2
    masks = []
    for thing in placed:
        mask = Image.new("1", ((SIDE + 2 * margin) * scale,) * 2)
        _fill(ImageDraw.Draw(mask), thing, (thing.outline() + margin) * scale, 1)
        masks.append(np.asarray(mask))
    inside = np.zeros_like(masks[0])
    inside[margin * scale : -margin * scale, margin * scale : -margin * scale] = True
    seen = []
    for thing, mask in zip(reversed(placed), reversed(masks), strict=True):
        hidden = 1 - float((mask & inside).sum()) / max(1, int(mask.sum()))
        if hidden > 0.6:
            return None
        seen.append(replace(thing, hidden=round(hidden, 3)))
        inside = inside & ~mask
    return tuple(reversed(seen))


def _fill(draw: ImageDraw.ImageDraw, thing: Thing, points: np.ndarray, value: int) -> None:
    draw.polygon([tuple(point) for point in points], fill=value)
    if thing.shape == "ring":
        draw.polygon([tuple(point) for point in (points + points.mean(0)) / 2], fill=0)


def paint(things: tuple[Thing, ...], ground: str, rng: np.random.Generator) -> Image.Image:
    """The picture, RGB 128 x 128, of objects given far to near."""
    picture = Image.fromarray(paint_ground(ground, SIDE, rng))
    for thing in things:
        _paint_thing(picture, thing, float(rng.uniform(0, 1)))
    return picture


def _paint_thing(picture: Image.Image, thing: Thing, phase: float) -> None:
    """Paint one object in place, anti-aliased, with its texture and an edge that shows on a ground of its colour."""
    points = thing.outline()
    left, top = (int(v) - 2 for v in points.min(0))
    width, height = (int(v) + 3 for v in points.max(0) - (left, top))
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    local = (points - (left, top)) * SUPERSAMPLING
    mask = Image.new("L", size)
    _fill(ImageDraw.Draw(mask), thing, local, 255)
    dark = sum(thing.tint) < 330
    shade = tuple(int(0.45 * value + (0.55 * 255 if dark else 0)) for value in thing.tint)
    fill = Image.fromarray(
        np.where(_texture(thing, size, phase)[..., None], *(np.array(tone, np.uint8) for tone in (shade, thing.tint)))
    )
    draw = ImageDraw.Draw(fill)
    loops = [local, (local + local.mean(0)) / 2] if thing.shape == "ring" else [local]
    for loop in loops:
        draw.line([tuple(point) for point in (*loop, loop[0])], fill=shade, width=SUPERSAMPLING + 1)
    small = (width, height)
    picture.paste(fill.resize(small, Image.Resampling.BOX), (left, top), mask.resize(small, Image.Resampling.BOX))


def _texture(thing: Thing, size: tuple[int, int], phase: float) -> np.ndarray:
    """Where the second tone goes, bool (height, width)."""
    rows, columns = np.mgrid[: size[1], : size[0]] / SUPERSAMPLING
    period = max(5.0, thing.diameter / 5)
    across = (columns * math.cos(thing.turn + 0.8) + rows * math.sin(thing.turn + 0.8)) / period + phase
    if thing.texture == "striped":
        return across % 1 < 0.42
    if thing.texture == "dotted":
        along = (rows * math.cos(thing.turn + 0.8) - columns * math.sin(thing.turn + 0.8)) / period + phase
        return np.hypot(across % 1 - 0.5, along % 1 - 0.5) < 0.29
    return np.zeros(size[::-1], bool)
