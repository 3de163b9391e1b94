"""Image codes by VQ-KD, BEiT v2's tokenizer: the picture squeezed to 224 x 224 -> 14 x 14 of 8,192 codes.

Weights: a file of its authors, such as vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.codes import CodeSettings, describe_codes
from opt.config import UserError
from opt.nn.vqkd import VQKD
from opt.weights import vqkd


class VQKDCodes:
    """VQ-KD as tokenizer of pictures."""

    def __init__(self, network: VQKD, weights: str, settings: CodeSettings, device: str) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.codebook, self.side = network.config.codebook, network.config.grid * network.config.patch
        self.weights, self.settings, self.device = weights, settings, device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> np.ndarray:
        """RGB picture -> codes (g, g) int16."""
        pixels = pil_to_tensor(picture.resize((self.side, self.side), Image.Resampling.BICUBIC)).to(self.device)
        return self.network.encode(pixels[None])[0].cpu().numpy().astype(np.int16)

    def decode(self, codes_Bgg: np.ndarray) -> list[Image.Image]:
        """Raises UserError: the codes stand for a teacher's features."""
        raise UserError("codes of VQ-KD stand for features of its teacher and not for pixels, so no picture can be "
                        "drawn from them; extract with --codes dvae:... or dalle:... where pictures are to be drawn")

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings."""
        return describe_codes("vqkd", self.weights, self.network, self.settings)


def load(weights: str, settings: CodeSettings, device: str) -> VQKDCodes:
    """Open a published file. Raises UserError where it is none, or its grid is not the one asked for."""
    network = vqkd.load(Path(weights))
    grid = network.config.grid
    if settings.codes_grid != grid:
        raise UserError(f"--codes-grid {settings.codes_grid}: {weights} tells a picture in {grid} x {grid} codes, and "
                        f"knows no other places; give --codes-grid {grid}")
    return VQKDCodes(network, weights, settings, device)
