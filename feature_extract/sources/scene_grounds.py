"""The grounds of spoken scenes: eight backgrounds, each a gradient with its own kind of grain."""

from __future__ import annotations

import numpy as np

_TOP_AND_BOTTOM: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((128, 178, 92), (92, 146, 66)),
    "sand": ((232, 208, 160), (212, 182, 128)),
    "sky": ((120, 178, 232), (190, 220, 244)),
    "night": ((24, 26, 62), (54, 50, 98)),
    "snow": ((222, 230, 240), (236, 240, 246)),
    "brick": ((170, 92, 76), (156, 80, 66)),
    "water": ((72, 156, 178), (44, 118, 150)),
    "wood": ((166, 124, 82), (142, 100, 62)),
}
GROUNDS = tuple(_TOP_AND_BOTTOM)


def paint_ground(ground: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """The background alone, uint8 (side, side, 3)."""
    top, bottom = (np.array(color, float) + rng.uniform(-10, 10, 3) for color in _TOP_AND_BOTTOM[ground])
    rows, columns = np.mgrid[:side, :side]
    height = rows / (side - 1)
    picture = top * (1 - height[..., None]) + bottom * height[..., None]
    picture += _grain(ground, rows, columns, rng)[..., None]
    picture += rng.normal(0, 3, (side, side, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _grain(ground: str, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What makes the ground more than a gradient: brightness to add, (side, side)."""
    phase, side = rng.uniform(0, 2 * np.pi, 2), len(rows)
    if ground == "grass":
        return 14 * np.repeat(rng.normal(0, 1, (side // 4, side)), 4, axis=0)
    if ground == "sky":
        return 22 * np.clip(np.sin(rows / 17 + phase[0]) * np.sin(columns / 23 + phase[1] + rows / 40) - 0.2, 0, 1)
    if ground == "night":
        return 150.0 * (rng.random((side, side)) < 0.004)
    if ground == "brick":
        course = (rows + int(phase[0] * 3)) // 12
        mortar = ((rows + int(phase[0] * 3)) % 12 < 2) | ((columns + 12 * (course % 2) + int(phase[1] * 3)) % 24 < 2)
        return 46.0 * mortar
    if ground == "water":
        return 12 * np.sin(rows / 2.6 + 1.6 * np.sin(columns / 9 + phase[0]) + phase[1])
    if ground == "wood":
        return 13 * np.sin(columns / 3.2 + 2.2 * np.sin(rows / 27 + phase[0])) - 22.0 * (columns % 32 < 1)
    return np.zeros((side, side)) if ground == "snow" else rng.normal(0, 7, (side, side))
