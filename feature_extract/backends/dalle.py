"""Image codes by DALL-E's tokenizer: the squeezed picture, 8 x 8 pixels a code -> g x g of 8,192 codes, and back.

Weights: the file that `opt convert dalle` makes of OpenAI's encoder.pkl and decoder.pkl.
"""

from __future__ import annotations

from pathlib import Path

from feature_extract.backends.dvae import DiscreteVAECodes
from feature_extract.codes import CodeSettings
from opt.weights import dalle


def load(weights: str, settings: CodeSettings, device: str) -> DiscreteVAECodes:
    """Open a converted file. Raises UserError when it is none."""
    return DiscreteVAECodes(dalle.load(Path(weights)), "dalle", weights, settings, device)
