"""DALL-E's image tokenizer: pixels <-> codes at an eighth of the side (arXiv 2102.12092, appendix A).

    encoder   Conv 7x7, (Block, Block, 2x max pool) three times, Block, Block, ReLU, Conv 1x1 -> logits of the codes
    decoder   Conv 1x1, (Block, Block, 2x nearest) three times, Block, Block, ReLU, Conv 1x1 -> Laplace mean and scale

Sizes are those of the published encoder.pkl and decoder.pkl; `opt convert dalle` fills this module from them.
Shape legend: B pictures of H x W pixels, both multiples of 8, K codes of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_LAPLACE_MARGIN = 0.1
"""The logit-Laplace density lives on the open interval (0, 1): pixels are kept from its ends (appendix A.3)."""
GROUPS = 4


@dataclass(frozen=True)
class DALLEConfig:
    """Sizes; the values are the published ones."""

    codebook: int = 8192
    width: int = 256
    """Channels at the full side; twice, four and eight times as many at a half, a quarter and an eighth of it."""
    decoder_width: int = 128
    """Channels of the decoder's table of codes."""
    blocks: int = 2
    """Residual blocks at each resolution."""


class Block(nn.Module):
    """Residual bottleneck of a quarter of the width: four convolutions behind a ReLU each, scaled down with depth."""

    def __init__(self, width: int, to: int, kernels: tuple[int, int, int, int], depth: int) -> None:
        super().__init__()
        widths = (width, to // 4, to // 4, to // 4, to)
        self.skip = nn.Conv2d(width, to, 1) if width != to else nn.Identity()
        self.convolutions = nn.ModuleList(
            _convolution(*sizes) for sizes in zip(widths, widths[1:], kernels, strict=False)
        )
        self.gain = 1 / depth**2

    def forward(self, hidden: Tensor) -> Tensor:
        change = hidden
        for convolution in self.convolutions:
            change = convolution(change.relu())
        return self.skip(hidden) + self.gain * change


class Encoder(nn.Module):
    """Pixels (B, 3, H, W), squeezed by `map_pixels` -> logits (B, K, H/8, W/8)."""

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        widths = [config.width * factor for factor in (1, 1, 2, 4, 8)]
        self.stem = _convolution(3, widths[0], 7)
        self.groups = _groups(widths, config.blocks, (3, 3, 3, 1))
        self.head = _convolution(widths[-1], config.codebook, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.stem(pixels)
        for number, group in enumerate(self.groups):
            hidden = group(hidden if number == 0 else F.max_pool2d(hidden, 2))
        return self.head(hidden.relu())


class Decoder(nn.Module):
    """Weights over the codebook (B, K, H/8, W/8) -> (B, 6, H, W): mean and log scale of each squeezed pixel's logit."""

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        widths = [config.decoder_width, *(config.width * factor for factor in (8, 4, 2, 1))]
        self.stem = _convolution(config.codebook, widths[0], 1)
        self.groups = _groups(widths, config.blocks, (1, 3, 3, 3))
        self.head = _convolution(widths[-1], 6, 1)

    def forward(self, weights: Tensor) -> Tensor:
        hidden = self.stem(weights)
        for number, group in enumerate(self.groups):
            hidden = group(hidden if number == 0 else F.interpolate(hidden, scale_factor=2, mode="nearest"))
        return self.head(hidden.relu())


class DALLE(nn.Module):
    """Encoder and decoder with the face of `opt.nn.dvae.DiscreteVAE`: pixels in [0, 1] to codes and back."""

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the likeliest codes (B, H/8, W/8) int64."""
        return self.encoder(map_pixels(pixels)).argmax(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, H/8, W/8) int64 -> pixels (B, 3, H, W) in [0, 1]: the Laplace distributions' medians."""
        weights = F.one_hot(codes, self.config.codebook).permute(0, 3, 1, 2).float()
        return unmap_pixels(self.decoder(weights)[:, :3].sigmoid())


def map_pixels(pixels: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], where the logit-Laplace density is at home (appendix A.3)."""
    return (1 - 2 * LOGIT_LAPLACE_MARGIN) * pixels + LOGIT_LAPLACE_MARGIN


def unmap_pixels(squeezed: Tensor) -> Tensor:
    """The inverse of `map_pixels`, cut to [0, 1]."""
    return ((squeezed - LOGIT_LAPLACE_MARGIN) / (1 - 2 * LOGIT_LAPLACE_MARGIN)).clamp(0, 1)


def _groups(widths: list[int], blocks: int, kernels: tuple[int, int, int, int]) -> nn.ModuleList:
    """Four resolutions; the first block of each changes the width."""
    return nn.ModuleList(
        nn.Sequential(*(Block(width if block == 0 else to, to, kernels, GROUPS * blocks) for block in range(blocks)))
        for width, to in zip(widths, widths[1:], strict=False)
    )


def _convolution(width: int, to: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the side."""
    return nn.Conv2d(width, to, kernel, padding=kernel // 2)
