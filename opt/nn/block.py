"""Transformer block over packed tokens: self-attention, optional cross-attention, feed-forward; pre- or post-norm.

Shape legend: N tokens, M context tokens, D width, B sequences, L cached length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.attention import Attention


@dataclass
class BlockCache:
    """What a decoding step needs of one block: its own past (B, L, H, d), and the context's keys and values."""

    past_key: Tensor
    past_value: Tensor
    context_key: Tensor
    context_value: Tensor
    context_valid: Tensor


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Block(nn.Module):
    """One layer. `post_norm` normalises after each residual sum, as BERT; otherwise before each sub-layer.

    cross: adds cross-attention to a context. causal: self-attention sees only the past (decoders).
    """

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, post_norm: bool = False, cross: bool = False,
        causal: bool = False, epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.post_norm, self.causal = post_norm, causal
        self.self_norm, self.self_attention = nn.LayerNorm(width, epsilon), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, epsilon) if cross else None
        self.cross_attention = Attention(width, heads) if cross else None
        self.feed_norm, self.feed_forward = nn.LayerNorm(width, epsilon), FeedForward(width, inner)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_ND: Tensor, layout: AttentionLayout,
        context_MD: Tensor | None = None, context_layout: AttentionLayout | None = None,
    ) -> Tensor:
        """(N, D) -> (N, D). A block with cross-attention needs the context and its layout."""
        normed = self._before(self.self_norm, hidden_ND)
        hidden_ND = self._after(self.self_norm, hidden_ND, self.self_attention(normed, normed, layout, self.causal))
        if self.cross_attention is not None and self.cross_norm is not None:
            if context_MD is None or context_layout is None:
                raise ValueError("a block with cross-attention needs a context and its layout")
            normed = self._before(self.cross_norm, hidden_ND)
            hidden_ND = self._after(
                self.cross_norm, hidden_ND, self.cross_attention(normed, context_MD, context_layout)
            )
        fed = self.feed_forward(self._before(self.feed_norm, hidden_ND))
        return self._after(self.feed_norm, hidden_ND, fed)

    def cache(self, context_BLD: Tensor, context_valid_BL: Tensor) -> BlockCache:
        """An empty past, and the context's keys and values computed once for all steps."""
        assert self.cross_attention is not None
        key, value = self.cross_attention.keys_values(context_BLD)
        return BlockCache(key[:, :0], value[:, :0], key, value, context_valid_BL)

    def step(self, hidden_BD: Tensor, cache: BlockCache) -> Tensor:
        """One new token a sequence: (B, D) -> (B, D); the cache grows by it."""
        assert self.cross_attention is not None and self.cross_norm is not None
        normed = self._before(self.self_norm, hidden_BD)
        key, value = self.self_attention.keys_values(normed.unsqueeze(1))
        cache.past_key = torch.cat([cache.past_key, key], dim=1)
        cache.past_value = torch.cat([cache.past_value, value], dim=1)
        attended = self.self_attention.step(normed, cache.past_key, cache.past_value, None)
        hidden_BD = self._after(self.self_norm, hidden_BD, attended)
        normed = self._before(self.cross_norm, hidden_BD)
        attended = self.cross_attention.step(normed, cache.context_key, cache.context_value, cache.context_valid)
        hidden_BD = self._after(self.cross_norm, hidden_BD, attended)
        fed = self.feed_forward(self._before(self.feed_norm, hidden_BD))
        return self._after(self.feed_norm, hidden_BD, fed)

    def _before(self, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        return hidden if self.post_norm else norm(hidden)

    def _after(self, norm: nn.LayerNorm, hidden: Tensor, change: Tensor) -> Tensor:
        summed = hidden + self.dropout(change)
        return norm(summed) if self.post_norm else summed


class Stack(nn.Module):
    """Blocks in order; a pre-norm stack ends in a norm."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, dropout: float, post_norm: bool = False,
                 cross: bool = False, causal: bool = False, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, inner, dropout, post_norm, cross, causal, epsilon) for _ in range(layers)
        )
        self.final_norm = nn.Identity() if post_norm else nn.LayerNorm(width, epsilon)

    def forward(self, hidden_ND: Tensor, layout: AttentionLayout, context_MD: Tensor | None = None,
                context_layout: AttentionLayout | None = None) -> Tensor:
        """(N, D) -> (N, D)."""
        for block in self.blocks:
            hidden_ND = block(hidden_ND, layout, context_MD, context_layout)
        return self.final_norm(hidden_ND)

    def start(self, context_BLD: Tensor, context_valid_BL: Tensor) -> list[BlockCache]:
        """Caches of all blocks for step-by-step decoding over a padded context."""
        return [cast(Block, block).cache(context_BLD, context_valid_BL) for block in self.blocks]

    def step(self, hidden_BD: Tensor, caches: list[BlockCache]) -> Tensor:
        """One new token a sequence through all blocks: (B, D) -> (B, D); the caches grow."""
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden_BD = cast(Block, block).step(hidden_BD, cache)
        return self.final_norm(hidden_BD)
