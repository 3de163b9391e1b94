"""VQ-KD's encoder: pictures to codes of what a teacher such as CLIP sees (BEiT v2, arXiv 2208.06366, section 2).

    pixels -> patches -> ViT -> Linear, Tanh, Linear -> 32 numbers a patch -> the codebook's entry of the highest cosine

Only what gives codes: the decoder, which predicts a teacher's features and no pixels, serves training alone.
Shape legend: B pictures, g rows and columns of patches, p pixels of a patch's side, P patches of all pictures, F values
of a patch, L = 1 + g g, N = B L packed tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.batch import PatchTable, moved
from opt.data.layout import self_layout
from opt.data.pixels import Sight
from opt.nn.block import Stack
from opt.nn.embed import PatchEmbedder

EPSILON = 1e-6


@dataclass(frozen=True)
class VQKDConfig:
    """Sizes; the values are the published ones."""

    codebook: int = 8192
    code_width: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    grid: int = 14
    """Rows, and columns, of patches that positions were learned for."""
    patch: int = 16
    """Pixels of a patch's side."""


class VQKD(nn.Module):
    """Pictures to codes."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        half = (0.5, 0.5, 0.5)  # [0, 1] becomes [-1, 1]
        sight = Sight(config.grid * config.patch, config.patch, mean=half, deviation=half)
        self.embedder = PatchEmbedder(sight, config.width)
        self.encoder = Stack(config.layers, config.width, config.heads, config.inner, 0.0, epsilon=EPSILON)
        self.to_code = nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh(),
                                     nn.Linear(config.width, config.code_width))
        self.codes = nn.Embedding(config.codebook, config.code_width)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, g p, g p) uint8 -> what codes are chosen by: unit vectors (B, g g, 32)."""
        count, device = self.config.grid**2, pixels.device
        pixels_PF = F.unfold(pixels.float(), self.config.patch, stride=self.config.patch).mT.flatten(0, 1)
        places = torch.arange(1, 1 + count, device=device).repeat(len(pixels))[:, None]
        shown = torch.zeros(len(places), dtype=torch.bool, device=device)
        entries = self.embedder(PatchTable(pixels_PF, places, torch.ones_like(places, dtype=torch.float32), shown))
        own = torch.arange(1, len(entries), device=device).view(-1, count)
        hidden_ND = entries[F.pad(own, (1, 0)).flatten()]  # entry 0, the class token, before each picture's patches
        layout = moved(self_layout(np.full(len(pixels), 1 + count)), device)
        hidden_BLD = self.encoder(hidden_ND, layout).unflatten(0, (-1, 1 + count))
        return F.normalize(self.to_code(hidden_BLD[:, 1:]), dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, g p, g p) uint8 -> codes (B, g, g) int64, row by row."""
        cosine = self.features(pixels) @ F.normalize(self.codes.weight, dim=-1).T
        return cosine.argmax(-1).unflatten(1, (self.config.grid, self.config.grid))
