"""Image codes by DALL-E's tokenizer: the picture squeezed to 64 x 64 -> 8 x 8 of 8,192 codes, and back.

Weights: the file that `opt convert dalle` makes of OpenAI's encoder.pkl and decoder.pkl.
"""

from __future__ import annotations

from pathlib import Path

from feature_extract.backends.dvae import DiscreteVAECodes
from opt.weights import dalle


def load(weights: str, device: str) -> DiscreteVAECodes:
    """Open a converted file. Raises UserError when it is none."""
    return DiscreteVAECodes(dalle.load(Path(weights)), "dalle", weights, device)
