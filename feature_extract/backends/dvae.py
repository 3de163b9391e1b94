"""Image codes by our discrete VAE: the squeezed picture, 8 x 8 pixels a code -> g x g codes, and back.

Weights: "tiny" (the embedded network), the `model` folder of `opt pretrain dvae...`, or a .safetensors file of a
`DiscreteVAE` with its configuration in the header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.codes import CodeSettings, describe_codes
from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.nn.dalle import DALLE
from opt.nn.dvae import DiscreteVAE
from opt.systems.dvae import DVAE

PIXELS = 8
"""A code's, a side: both networks halve the picture three times."""


class DiscreteVAECodes:
    """A discrete VAE of either shape as tokenizer of pictures; `backend` is the one that opened it."""

    def __init__(
        self, dvae: DiscreteVAE | DALLE, backend: str, weights: str, settings: CodeSettings, device: str
    ) -> None:
        self.settings, self.side = settings, PIXELS * settings.codes_grid
        self.dvae = dvae.eval().requires_grad_(False).to(device)
        self.codebook = dvae.config.codebook
        self.backend, self.weights, self.device = backend, weights, device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> np.ndarray:
        """RGB picture -> codes (g, g) int16."""
        pixels = pil_to_tensor(picture.resize((self.side, self.side), Image.Resampling.BICUBIC)).to(self.device)
        return self.dvae.encode(pixels[None].float() / 255)[0].cpu().numpy().astype(np.int16)

    @torch.inference_mode()
    def decode(self, codes_Bgg: np.ndarray) -> list[Image.Image]:
        """Codes (B, g, g) -> B pictures of 8 g x 8 g, one by one: in the memory of one, and each the same as alone."""
        pictures = []
        for codes_gg in torch.from_numpy(codes_Bgg.astype(np.int64)):
            pixels = self.dvae.decode(codes_gg[None].to(self.device))[0]
            pictures.append(Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()))
        return pictures

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings."""
        return describe_codes(self.backend, self.weights, self.dvae, self.settings)


def load(weights: str, settings: CodeSettings, device: str) -> DiscreteVAECodes:
    """Open "tiny", a model's folder or a file. Raises UserError when it is not a discrete VAE of ours."""
    from feature_extract.tiny import codes, weights_file

    if Path(weights).is_dir():
        system = from_pretrained(weights)
        if not isinstance(system, DVAE):
            raise UserError(f"codes {weights!r}: holds a model of system {system.name!r}; give one that "
                            "`opt pretrain dvae.base` trained")
        return DiscreteVAECodes(system.dvae, "dvae", weights, settings, device)
    path = weights_file.FOLDER / "codes.safetensors" if weights == "tiny" else Path(weights)
    try:
        dvae = codes.load(path)
    except UserError:
        raise
    except Exception as error:  # missing file, another format, another network: one answer to all
        raise UserError(f"codes {weights!r}: not a discrete VAE of ours ({str(error).splitlines()[0]})") from error
    return DiscreteVAECodes(dvae, "dvae", weights, settings, device)
