"""The image tokenizer as a system: a discrete VAE trained by the same trainer (OPT Figure 2; DALL-E, arXiv 2102.12092).

    stored JPEG --loader worker--> 64 x 64 pixels --encoder--> logits --Gumbel-softmax--> weights --decoder--> pixels

The model's folder serves extraction: `opt extract ... --codes dvae:runs/dvae/model`.
Shape legend: B pictures, K codes of the codebook, grid 8 x 8.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.pack import Packer
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import CODE_GRID, Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.distributed import sum_with_gradient
from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig, place_divergence, usage_divergence
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.system import DataFacts, Output, Preset, Progress, System

CODES = CODE_GRID[0] * CODE_GRID[1]
SIDE = 8 * CODE_GRID[0]
"""Pixels of the squeezed picture: 8 x down to the grid of codes."""
MOST_CODES = 2**15
"""Shards hold codes as int16."""
SHOWN = 8
"""Pictures whose codes are decoded for the log and for the eye."""


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes, temperature and loss of the dVAE; the paper says none of them (gap A13)."""

    codebook: int = 8192
    """How many codes there are (gap A13: as the official code)."""
    widths: tuple[int, int, int] = (128, 256, 512)
    """Channels at 32, 16 and 8 pixels, multiples of 8 (gap A13)."""
    temperature_start: float = 1.0
    """Temperature of the Gumbel-softmax in the first step (gap A13)."""
    temperature_end: float = 1 / 16
    """Temperature once it has fallen: nearly one-hot, as codes are used (gap A13)."""
    anneal_share: float = 0.7
    """Share of the steps in which the temperature falls, by equal factors (gap A13)."""
    reconstruction_weight: float = 100.0
    """Weight of the mean squared error of pixels in [0, 1] (gap A13)."""
    divergence: Literal["usage", "place"] = "usage"
    """What is kept near uniform: the batch's mean use of the codebook, or each place's distribution as DALL-E. The
    latter asks every place to be undecided, and left most codes of small codebooks unused (gap A13)."""
    divergence_weight: float = 0.05
    """Weight of that divergence, in nats (gap A13)."""


def tiny() -> Preset:
    """The embedded network's sizes: 512 codes, 1.2 million parameters; for two CPU cores."""
    return Preset(
        DVAEConfig(codebook=512, widths=(32, 64, 128)),
        LoopConfig(steps=2000, batch_tokens=32 * CODES),
        OptimConfig(learning_rate=2e-3, beta2=0.95, weight_decay=1e-4),
    )


def base() -> Preset:
    """8,192 codes and 25 million parameters, for photos and one GPU."""
    return Preset(
        DVAEConfig(),
        LoopConfig(steps=50_000, batch_tokens=256 * CODES, workers=8, save_every=1000),
        OptimConfig(learning_rate=5e-4, beta2=0.95, weight_decay=1e-4),
    )


class DVAE(System):
    """A discrete VAE learning to tell pictures in 64 codes each."""

    name = "dvae"
    config_type = DVAEConfig
    reads_text = False

    def __init__(self, config: DVAEConfig, tokenizer: Tokenizer | None, facts: DataFacts) -> None:
        super().__init__()
        if not 0 < config.temperature_end <= config.temperature_start:
            raise ValueError(f"temperature_end {config.temperature_end} must be above 0, and at most temperature_start")
        if not 0 < config.anneal_share <= 1:
            raise ValueError(f"anneal_share {config.anneal_share} must be above 0, and at most 1")
        if not 1 <= config.codebook <= MOST_CODES:
            raise ValueError(f"codebook {config.codebook} must be from 1 to {MOST_CODES:,}, as codes are stored")
        if min(config.widths) < 1:
            raise ValueError(f"widths {config.widths} must be at least 8, and multiples of 8")
        if not all(0 <= weight < math.inf for weight in (config.reconstruction_weight, config.divergence_weight)):
            raise ValueError("reconstruction_weight and divergence_weight must be at least 0, and finite")
        self.config, self.facts = config, facts
        self.dvae = DiscreteVAE(DiscreteVAEConfig(config.codebook, config.widths))

    def preparer(self) -> Pixels:
        """Samples -> pixels of their first pictures."""
        return Pixels()

    def temperature(self, progress: Progress) -> float:
        """Falls by equal factors from start to end over `anneal_share` of the steps, and stays there."""
        fraction = min(1.0, progress.fraction / self.config.anneal_share)
        return self.config.temperature_start ** (1 - fraction) * self.config.temperature_end ** fraction

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Encode, draw soft codes, decode. Terms of weight 0 are for the log alone: what codes give, and how many.

        The mean of "error_of_codes" is 10 ** (-PSNR / 10). What holds of a batch as a whole, of all ranks, counts once
        for each place: its mean over micro-batches is by their places.
        """
        pixels = batch.extra["pixels"].float() / 255
        drawn, logits = self.dvae(pixels, self.temperature(progress))
        with torch.no_grad():
            codes = logits.argmax(dim=1)
            error = (self.dvae.decode(codes[:SHOWN]).float() - pixels[:SHOWN]).square()
        counts, config, own_places = batch.counts, self.config, codes.numel()
        divergence = usage_divergence(logits) * own_places if config.divergence == "usage" \
            else place_divergence(logits).sum()
        return Output({
            "reconstruction": Term((drawn.float() - pixels).square().sum(), counts["values"],
                                   config.reconstruction_weight),
            "divergence": Term(divergence, counts["places"], config.divergence_weight),
            "error_of_codes": Term(error.sum(), counts["shown"], 0.0),
            "codes_used": Term(_codes_used(codes, config.codebook) * own_places, counts["places"], 0.0),
        })

    @torch.no_grad()
    def illustrate(self, batch: Batch) -> Tensor:
        """Originals over what their codes give, eight of the batch: uint8 (128, 512, 3)."""
        pixels = batch.extra["pixels"][:SHOWN]
        decoded = self.dvae.decode(self.dvae.encode(pixels.float() / 255))
        rows = torch.stack([pixels, (255 * decoded).round().to(torch.uint8)])
        return rows.permute(0, 3, 1, 4, 2).reshape(2 * SIDE, -1, 3)


class Pixels:
    """The preparer: decodes each sample's stored JPEG and squeezes it to 64 x 64, as extraction does. Picklable.

    extra["pixels"]: uint8 (B, 3, 64, 64). counts: "values" of those pixels, "places" that get a code, "shown": those
    pixels' values whose codes are decoded.
    """

    jpeg = True
    tasks = Tasks(("draw",), (1.0,))

    def cost(self, lengths: Lengths) -> np.ndarray:
        """64 codes a picture, so that the token budget fixes the pictures of a batch."""
        return np.full(len(lengths), CODES, np.int64)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """Raises UserError for a sample whose picture was not stored."""
        rows = [samples[int(index)] for index in plan.sample]
        pixels = torch.from_numpy(np.stack([_pixels(sample) for sample in rows]))
        counts = {"values": pixels.numel(), "places": CODES * len(rows), "shown": pixels[:SHOWN].numel()}
        batch = Packer(1, 1).batch([sample.key for sample in rows], {}, {"pixels": pixels}, counts)
        return dataclasses.replace(batch, tokens=CODES * len(rows))


def _pixels(sample: Sample) -> np.ndarray:
    """The sample's first picture, uint8 (3, 64, 64)."""
    jpeg = sample.pictures[0].jpeg if sample.pictures else None
    if jpeg is None:
        raise UserError(f"sample {sample.key!r} holds no stored picture, which the dVAE learns from; give shards of "
                        "records with pictures, extracted without --no-jpeg")
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
        return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _codes_used(codes: Tensor, codebook: int) -> Tensor:
    """How many different codes the batch's pictures are told in, those of all ranks: scalar."""
    used_K = torch.zeros(codebook, device=codes.device).index_fill_(0, codes.flatten(), 1.0)
    return sum_with_gradient(used_K).clamp(max=1.0).sum()
