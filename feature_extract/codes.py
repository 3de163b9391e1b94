"""What a code extractor is: a picture to image codes on a square grid, and codes back to pictures.

A backend is a module `backends/NAME.py` with `load(weights, settings, device) -> CodeExtractor`. A code stands for a
square of so many pixels a side, which is the backend's own: 8 for discrete VAEs, 16 for VQ-KD. Shape legend: B
pictures, g rows and columns of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import nn

from feature_extract.description import describe
from opt.data.record import CODE_GRID

SIDE = 64
"""Pixels of a picture of 8 x 8 codes, 8 x down: how drawn pictures are shown and compared."""


@dataclass(frozen=True)
class CodeSettings:
    """How finely a picture is told in codes."""

    codes_grid: int = CODE_GRID[0]
    """Rows, and columns, of the image codes of a picture: 8 for OPT, which draws such; 24 for patches of 16 pixels of a
    picture of 384 (docs/extraction.md)."""


USUAL = CodeSettings()


class CodeExtractor(Protocol):
    """Batch-invariant: one picture a call. `codebook` counts the codes that exist."""

    codebook: int
    settings: CodeSettings

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """RGB picture -> codes (g, g) int16. The whole picture is squeezed into a square."""

    def decode(self, codes_Bgg: np.ndarray) -> list[Image.Image]:
        """Codes (B, g, g), of any g -> B pictures, each as it would be alone. Raises UserError where it cannot."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings: enough to build the same extractor again."""


def describe_codes(backend: str, weights: str, network: nn.Module, settings: CodeSettings) -> dict[str, Any]:
    """A code extractor's description. The usual grid goes unsaid, as in shards from before there were others."""
    return describe(backend, weights, network, None if settings == USUAL else settings)
