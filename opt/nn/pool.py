"""Attentional pooling: learned queries look at each sequence and sum it up (CoCa, arXiv 2205.01917, section 3.2).

Shape legend: N packed tokens, S sequences, Q queries, D width, C width of the tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from opt.nn.attention import Attention
from opt.nn.states import States, onto


class AttentionalPooler(nn.Module):
    """Multi-head attention of learned queries over the tokens of each sequence, both normalised first.

    context_width: width of the tokens.
    """

    def __init__(self, width: int, heads: int, queries: int, context_width: int | None = None, epsilon: float = 1e-5
                 ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.query_norm, self.token_norm = nn.LayerNorm(width, epsilon), nn.LayerNorm(context_width or width, epsilon)
        self.attention = Attention(width, heads, context_width)

    def forward(self, tokens: States) -> States:
        """What the queries found in each of the S sequences: S sequences of Q tokens, (S Q, D)."""
        lengths = np.full(len(tokens), len(self.query), np.int64)
        query_ND = self.query_norm(self.query).repeat(len(tokens), 1)
        layout = onto(lengths, tokens.lengths, query_ND.device)
        return States(self.attention(query_ND, self.token_norm(tokens.hidden), layout), lengths)
