"""What a region extractor is: a picture to the features, boxes, classes and scores of the regions in it.

A backend is a module `backends/NAME.py` with `load(weights, settings, device) -> RegionExtractor`.
Shape legend: R regions, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class RegionSettings:
    """max_regions: at most so many. score_threshold: below it none but the best, where all are below."""

    max_regions: int = 36
    score_threshold: float = 0.2


@dataclass(frozen=True)
class Regions:
    """features (R, D) float16, boxes (R, 4) float32 in [0, 1], classes (R,) int16, scores (R,) float32, best first."""

    features: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


class RegionExtractor(Protocol):
    """Batch-invariant: one picture a call. `classes` names the detector's classes, background left out."""

    classes: tuple[str, ...]

    def __call__(self, picture: Image.Image) -> Regions:
        """The regions of an RGB picture."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 and the settings: enough to build the same extractor again."""
