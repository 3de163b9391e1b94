"""What a code extractor is: a picture to 8 x 8 image codes, and codes back to pictures.

A backend is a module `backends/NAME.py` with `load(weights, device) -> CodeExtractor`. Shape legend: B pictures.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

SIDE = 64
"""Pixels of the squeezed picture: 8 x 8 codes, 8 x down."""


class CodeExtractor(Protocol):
    """Batch-invariant: one picture a call. `codebook` counts the codes that exist."""

    codebook: int

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """RGB picture -> codes (8, 8) int16. The whole picture is squeezed into a square."""

    def decode(self, codes_B88: np.ndarray) -> list[Image.Image]:
        """Codes (B, 8, 8) -> B pictures of 64 x 64, each of them as it would be alone."""

    def describe(self) -> dict[str, Any]:
        """Backend, weights and their SHA-256: enough to build the same extractor again."""
