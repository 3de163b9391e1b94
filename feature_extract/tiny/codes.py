"""The embedded image tokenizer: our dVAE with 512 codes, 64 x 64 pixels -> 8 x 8 codes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from feature_extract.tiny import weights_file
from feature_extract.tiny.pool import Pool, Schedule
from opt import config as configuration
from opt.nn.dvae import DiscreteVAE, DiscreteVAEConfig, usage_divergence

SIDE = 64


def load(path: Path) -> DiscreteVAE:
    """A trained dVAE from a file, in evaluation mode."""
    dvae = DiscreteVAE(configuration.from_dict(DiscreteVAEConfig, weights_file.read_config(path), str(path)))
    weights_file.read_into(path, dvae)
    return dvae


def train(pool: Pool, minutes: float, seed: int, out: Path) -> None:
    """Squared error, five times heavier on objects, and evenly used codes; Gumbel temperature 1 -> 1/16."""
    torch.manual_seed(seed)
    pixels = torch.from_numpy(np.stack(pool.pictures(SIDE))).permute(0, 3, 1, 2)
    weights = torch.from_numpy(np.stack([_weights(scene["objects"]) for scene in pool.scenes]))
    dvae = DiscreteVAE(DiscreteVAEConfig()).train()
    optimizer = torch.optim.AdamW(dvae.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    for batch in Schedule(pool, 32, minutes, seed, optimizer, 2e-3):
        rows = torch.from_numpy(batch.rows)
        target = pixels[rows].float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            drawn, logits = dvae(target, temperature=16 ** -min(1.0, batch.fraction / 0.7))
        error = ((drawn.float() - target).square() * weights[rows]).mean()
        batch.step(100 * error + 0.05 * usage_divergence(logits), dvae, 1.0)
        if batch.save:
            weights_file.write(out, dvae, configuration.to_dict(dvae.config))
    held = pixels[torch.from_numpy(pool.held_out)].float() / 255
    with torch.inference_mode():
        codes = dvae.eval().encode(held)
        error = (dvae.decode(codes) - held).square().mean()
    print({"psnr": -10 * math.log10(error), "codes_used": len(codes.unique())})


def _weights(objects: list[dict]) -> np.ndarray:
    """How much the error of each pixel counts, uint8 (1, 64, 64): grounds are large, but pictures are about objects."""
    weights = np.ones((1, SIDE, SIDE), np.uint8)
    for thing in objects:
        left, top, right, bottom = (round(SIDE * side) for side in thing["box"])
        weights[:, top:bottom, left:right] = 5
    return weights
