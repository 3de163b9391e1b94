"""Discrete VAE: 64 x 64 pixels <-> 8 x 8 codes (OPT Figure 2; DALL-E, arXiv 2102.12092, section 2.1).

    encoder   Conv, (2x down, Block) three times, Conv -> logits over the codebook at each of 8 x 8 places
    decoder   Conv, (Block, 2x up) three times, Conv -> pixels: the shape of the paper's Figure 2

Trained through a Gumbel-softmax whose temperature falls; used by taking the likeliest code.
Shape legend: B pictures, K codes of the codebook, grid 8 x 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from opt.distributed import sum_with_gradient, world


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """widths: channels at 32, 16 and 8 pixels; codebook: how many codes there are."""

    codebook: int = 512
    widths: tuple[int, int, int] = (32, 64, 128)


class Block(nn.Module):
    """Residual: norm, SiLU, 3x3 convolution, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


class DiscreteVAE(nn.Module):
    """Pixels in [0, 1] to codes and back."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        high, middle, low = config.widths
        to_codes = nn.Conv2d(low, config.codebook, 1)
        # Codes must differ by more than the Gumbel noise from the first step on, or the decoder learns to ignore them.
        nn.init.normal_(to_codes.weight, std=3 / math.sqrt(low))
        self.encoder = nn.Sequential(
            nn.Conv2d(3, high, 4, 2, 1), Block(high), nn.Conv2d(high, middle, 4, 2, 1), Block(middle),
            nn.Conv2d(middle, low, 4, 2, 1), Block(low), nn.GroupNorm(8, low), nn.SiLU(), to_codes,
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.codebook, low, 1, bias=False), Block(low), _Up(low, middle), Block(middle),
            _Up(middle, high), Block(high), nn.GroupNorm(8, high), nn.SiLU(), _Up(high, 3),
        )

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [0, 1] -> (B, K, 8, 8)."""
        return self.encoder(2 * pixels - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [0, 1] -> codes (B, 8, 8) int64."""
        return self.logits(pixels).argmax(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 8, 8) int64 -> pixels (B, 3, 64, 64) in [0, 1]."""
        return self.pixels(F.one_hot(codes, self.config.codebook).permute(0, 3, 1, 2).float())

    def pixels(self, weights: Tensor) -> Tensor:
        """Weights over the codebook (B, K, 8, 8), one-hot or soft -> pixels (B, 3, 64, 64) in [0, 1]."""
        return self.decoder(weights).sigmoid()

    def forward(self, pixels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Training pass: the reconstruction (B, 3, 64, 64) in [0, 1], and the logits (B, K, 8, 8) float32 behind it.

        The decoder sees the soft Gumbel-softmax weights, so that gradients are exact for what is computed. One-hot
        weights with the soft gradient (straight-through) would be biased; the falling temperature brings the soft
        weights near one-hot instead (DALL-E, section 2.1; Jang et al., arXiv 1611.01144).
        """
        logits = self.logits(pixels).float()
        return self.pixels(F.gumbel_softmax(logits, tau=temperature, dim=1)), logits


def usage_divergence(logits: Tensor) -> Tensor:
    """How unevenly the batch uses the codebook: KL of the codes' mean probability over all places to the uniform one.

    logits (B, K, 8, 8) -> nats, scalar: 0 for even use, log K for one code alone. The batch is that of all ranks, which
    have equally many pictures and all get the same value.
    """
    usage_K = sum_with_gradient(logits.softmax(dim=1).mean(dim=(0, 2, 3))) / world()
    return math.log(len(usage_K)) + (usage_K * (usage_K + 1e-9).log()).sum()


def place_divergence(logits: Tensor) -> Tensor:
    """KL of each place's distribution to the uniform one, as DALL-E's evidence lower bound has it: nats (B, 8, 8).

    It asks every place to be undecided: on small codebooks that left nine codes of ten unused.
    """
    log_probability = logits.log_softmax(dim=1)
    return math.log(logits.shape[1]) + (log_probability.exp() * log_probability).sum(dim=1)


class _Up(nn.Sequential):
    """Twice as wide and high, then a 3x3 convolution."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, to, 3, padding=1))
