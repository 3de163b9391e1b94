"""A picture to what the network reads: BGR, resized to a shorter side of 600 pixels, means taken off.

Shape legend: H, W rows and columns of the resized picture.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from feature_extract.bottom_up.conventions import Conventions

SMALLEST = 16
"""Pixels: one cell of the network's map; a resized picture with a shorter side has nothing to pool from."""


def prepare(picture: Image.Image, conventions: Conventions) -> tuple[Tensor, tuple[float, float]]:
    """Pixels (1, 3, H, W) float32, and what x and y were multiplied by.

    Raises ValueError for a picture so narrow that resizing leaves less than 16 pixels of it.
    """
    resize = _opencv if conventions.resize == "opencv" else _pillow
    return resize(picture, conventions)


def _opencv(picture: Image.Image, conventions: Conventions) -> tuple[Tensor, tuple[float, float]]:
    """As cv2.resize with factors and INTER_LINEAR, after the means: sizes round half to even, the factor stays."""
    scale = conventions.short_side / min(picture.size)
    if round(scale * max(picture.size)) > conventions.long_side:
        scale = conventions.long_side / max(picture.size)
    size = (round(picture.height * scale), round(picture.width * scale))
    _check(picture, size)
    pixels = torch.from_numpy(_normalise(np.asarray(picture), conventions))[None]
    # in float64: float32 would place column 2,000 a ten-thousandth of a pixel off
    resized = torch.ops.aten.upsample_bilinear2d(pixels.double(), size, False, scale, scale)
    return resized.float(), (scale, scale)


def _pillow(picture: Image.Image, conventions: Conventions) -> tuple[Tensor, tuple[float, float]]:
    """As detectron2's ResizeShortestEdge: Pillow's bilinear filter, sizes rounded half up, then the means."""
    scale = conventions.short_side / min(picture.size)
    height, width = scale * picture.height, scale * picture.width
    if (longer := max(height, width)) > conventions.long_side:
        height, width = (side * (conventions.long_side / longer) for side in (height, width))
    size = (int(height + 0.5), int(width + 0.5))
    _check(picture, size)
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(_normalise(resized, conventions))[None], (size[1] / picture.width, size[0] / picture.height)


def _check(picture: Image.Image, size: tuple[int, int]) -> None:
    if min(size) < SMALLEST:
        raise ValueError(f"a picture of {picture.width:,} x {picture.height:,} pixels is too narrow")


def _normalise(rgb: np.ndarray, conventions: Conventions) -> np.ndarray:
    """(H, W, 3) bytes, red first -> (3, H, W) float32, blue first, less the means, over the deviations."""
    pixels = rgb[:, :, ::-1].astype(np.float32)
    pixels -= np.array(conventions.means, np.float32)
    pixels /= np.array(conventions.deviations, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
