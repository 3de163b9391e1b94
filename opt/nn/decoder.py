"""Decoder: writes tokens one after another, looking at an encoded context (text, or image codes).

Training runs all positions at once over packed targets; generation runs one step at a time with a dense cache.
Shape legend: N packed target tokens, M context tokens, D width, V tokens of the decoder; in steps:
B samples, R rows (B, or B beams).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.block import BlockCache, Stack
from opt.nn.dropout import Dropout


class Decoder(nn.Module):
    """Causal transformer with cross-attention (paper section 3.3). The token table may be shared with an encoder.

    positions: the longest sequence, the start token included.
    """

    def __init__(self, layers: int, width: int, heads: int, inner: int, vocabulary: int, positions: int,
                 dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(positions, width)
        self.embed_norm, self.dropout = nn.LayerNorm(width), Dropout(dropout)
        self.stack = Stack(layers, width, heads, inner, dropout, cross=True, causal=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, ids_N: Tensor, positions_N: Tensor, layout: AttentionLayout,
        context_MD: Tensor, context_layout: AttentionLayout, table_VD: Tensor,
    ) -> Tensor:
        """Hidden states (N, D) that predict the token after each position; `logits` turns them into words."""
        hidden_ND = self._embed(ids_N, positions_N, table_VD)
        return self.stack(hidden_ND, layout, context_MD, context_layout)

    def logits(self, hidden: Tensor, table_VD: Tensor) -> Tensor:
        """(..., D) -> (..., V), tied to the token table."""
        own = len(self.bias)  # a slice is cast anew each time, the whole table once a step
        return F.linear(hidden, table_VD if len(table_VD) == own else table_VD[:own], self.bias)

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], table_VD: Tensor) -> Tensor:
        """Logits (R, V) of the token after `ids_R`, which stands at `position`; the caches take it in."""
        hidden_RD = self._embed(ids_R, torch.full_like(ids_R, position), table_VD)
        return self.logits(self.stack.step(hidden_RD, position, caches), table_VD)

    def _embed(self, ids: Tensor, positions: Tensor, table_VD: Tensor) -> Tensor:
        return self.dropout(self.embed_norm(F.embedding(ids, table_VD) + self.position(positions)))


class TiedDecoder:
    """A decoder with the token table that it shares: a `Writer` (opt/nn/writing.py)."""

    def __init__(self, decoder: Decoder, table_VD: Tensor) -> None:
        self.decoder, self.table_VD = decoder, table_VD
        self.vocabulary = len(decoder.bias)

    def start(self, context_BMD: Tensor, valid_BM: Tensor, length: int, beams: int = 1) -> list[BlockCache]:
        """Caches of all blocks."""
        return self.decoder.stack.start(context_BMD, valid_BM, length, beams)

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], parents_R: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the next token."""
        if parents_R is not None:
            for cache in caches:
                cache.follow(position, parents_R)
        return self.decoder.step(ids_R, position, caches, self.table_VD)
