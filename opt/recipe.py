"""How a system is trained: the loop and the optimizer. A preset carries its recipe; the command line may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train."""

    steps: int = 1000
    batch_tokens: int = 8192
    """Tokens of one batch: as many samples as fit (gap A16)."""
    seed: int = 0
    precision: str = "auto"
    """bfloat16 where the processor multiplies it fast (auto), or bfloat16 or float32."""
    workers: int = 1
    """Processes that read and pack batches."""
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class OptimConfig:
    """How weights move: AdamW (gap A15)."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises from zero."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to `final` of its height afterwards."""
    final: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    """Not applied to biases, norms and other vectors."""
    clip: float = 1.0
    """Largest gradient norm."""
