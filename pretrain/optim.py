"""AdamW without decay on vectors; linear warm-up, then cosine or linear decay (docs/opt.md, gap A15)."""

from __future__ import annotations

import math

import torch
from torch import nn

from opt.recipe import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors and scalars do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    fraction = (step - warm) / max(1, steps - warm)
    shape = (1 + math.cos(math.pi * fraction)) / 2 if config.decay == "cosine" else 1 - fraction
    return config.learning_rate * (config.final + (1 - config.final) * shape)
