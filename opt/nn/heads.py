"""Heads: from hidden states to words, classes, features, match labels and the shared embedding space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenHead(nn.Module):
    """Linear, GELU, LayerNorm, then the tied embedding table plus a bias: logits (M, V) (BERT's head)."""

    def __init__(self, width: int, vocabulary: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, epsilon)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden_MD: Tensor, table_VD: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.transform(hidden_MD))), table_VD, self.bias)


class Pooler(nn.Module):
    """Linear and tanh on the first token: (S, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, first_SD: Tensor) -> Tensor:
        return torch.tanh(self.linear(first_SD))


class AnswerHead(nn.Sequential):
    """Linear to twice the width, GELU, LayerNorm, linear: logits (S, A) over a list of answers (UNITER)."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, answers))


class Projection(nn.Module):
    """Linear to the shared space, then unit length: (S, E) float32."""

    def __init__(self, width: int, space: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, space, bias)

    def forward(self, pooled_SD: Tensor) -> Tensor:
        return F.normalize(self.linear(pooled_SD).float(), dim=-1)


class Temperature(nn.Module):
    """A learned scale g = log(1 / temperature), kept where the temperature is from `lowest` to `highest` by `clamp`
    after each step: from 0.01 to 1 in CLIP, from 0.001 to 0.5 in ALBEF and BLIP.

    One number in a vector, (1,): FSDP shards the first dimension.
    """

    def __init__(self, initial: float = 0.07, lowest: float = 0.01, highest: float = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / initial)]))
        self.range = math.log(1 / highest), math.log(1 / lowest)

    def forward(self) -> Tensor:
        return self.log_scale.float().exp()

    @torch.no_grad()
    def clamp(self) -> None:
        self.log_scale.clamp_(*self.range)
