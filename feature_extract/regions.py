"""What a region extractor is: a picture to the features, boxes, classes and scores of the regions in it.

A backend is a module `backends/NAME.py` with `load(weights, settings, device) -> RegionExtractor`.
Shape legend: P proposals, R regions, C classes without background, K best classes, A best attributes, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from opt.config import UserError

BEST_ATTRIBUTES = 4
"""So many attributes of a region are stored, best first; a detector with fewer gives all."""


@dataclass(frozen=True)
class RegionSettings:
    """How many regions of a picture are kept, and what of each.

    Bottom-up attention's 10 to 100 boxes are min_regions=10, max_regions=100; its fixed 36 are 36 and 36.
    """

    max_regions: int = 36
    """At most so many regions, the best."""
    min_regions: int = 1
    """At least so many: where fewer pass the threshold, the best of the others fill up, as far as there are any."""
    score_threshold: float = 0.2
    """Regions with a score below it are left out."""
    top_classes: int = 0
    """So many best classes of each region are stored with their scores; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_regions <= self.max_regions or self.max_regions < 1:
            raise UserError(f"min_regions {self.min_regions}, max_regions {self.max_regions}: expected "
                            "0 <= min_regions <= max_regions and at least one at most")
        if self.top_classes < 0:
            raise UserError(f"top_classes {self.top_classes}: expected a number of classes, or 0 to store none")


@dataclass(frozen=True)
class Regions:
    """The regions of one picture, best first.

    features (R, D) float16, boxes (R, 4) float32 in [0, 1], classes (R,) int16, scores (R,) float32.
    top_classes (R, K) int16, top_scores (R, K) float16: the K most probable classes, best first, background left out;
    column 0 need not equal `classes`, for suppression may have left a region its second. None when not asked for.
    attributes (R, A) int16, attribute_scores (R, A) float16: the same of attributes; None when the detector has none.
    """

    features: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    top_classes: np.ndarray | None = None
    top_scores: np.ndarray | None = None
    attributes: np.ndarray | None = None
    attribute_scores: np.ndarray | None = None


class RegionExtractor(Protocol):
    """Batch-invariant: one picture a call. `classes`, `attributes`: names, background left out; () without any."""

    classes: tuple[str, ...]
    attributes: tuple[str, ...]

    def __call__(self, picture: Image.Image) -> Regions:
        """The regions of an RGB picture."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256 and the settings: enough to build the same extractor again."""


def best(probabilities_RC: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` most probable columns of each row, best first: numbers (R, K) int16, probabilities (R, K) float16."""
    top = probabilities_RC.topk(min(count, probabilities_RC.shape[1]), dim=1)
    return top.indices.cpu().numpy().astype(np.int16), top.values.cpu().numpy().astype(np.float16)


def read_names(path: Path) -> tuple[str, ...]:
    """One name a line; of "gray,grey", the first. Raises UserError for a file that is no text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} could not be read as names, one a line ({error})") from error
    return tuple(line.split(",")[0].strip() for line in lines if line.strip())
