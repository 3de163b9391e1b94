"""Transformer block over packed tokens: self-attention, optional cross-attention, feed-forward; pre- or post-norm.

Shape legend: N tokens, M context tokens, D width; in steps: B samples, R rows (B, or B beams), L length, H heads,
d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.attention import Attention
from opt.nn.dropout import Dropout


@dataclass(frozen=True)
class BlockCache:
    """What a decoding step needs of one block, for R rows: the past, with room for all L steps; the context.

    past_key, past_value (R, L, H, d), filled up to the step at hand. context_key, context_value (B, M, H, d), of which
    context_valid (B, M) are real: a sample's rows share them.
    """

    past_key: Tensor
    past_value: Tensor
    context_key: Tensor
    context_value: Tensor
    context_valid: Tensor

    def write(self, position: int, key_RHd: Tensor, value_RHd: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of a step in their place; returns all up to it, (R, position + 1, H, d)."""
        self.past_key[:, position], self.past_value[:, position] = key_RHd, value_RHd
        return self.past_key[:, : position + 1], self.past_value[:, : position + 1]

    def follow(self, position: int, parents_R: Tensor) -> None:
        """Each row takes over the past of another row (B K rows, a sample's K beside each other) before `position`."""
        for past in (self.past_key, self.past_value):
            past[:, :position] = past[parents_R, :position]


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
        self.dropout = Dropout(dropout)

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

    def cache(self, context_BMD: Tensor, context_valid_BM: Tensor, length: int, beams: int) -> BlockCache:
        """Room for a past of `length` steps of B x `beams` rows; the context's keys and values, computed once."""
        assert self.cross_attention is not None
        key_BMHd, value_BMHd = self.cross_attention.keys_values(context_BMD)
        past = key_BMHd.new_zeros(2, len(key_BMHd) * beams, length, *key_BMHd.shape[2:])
        return BlockCache(past[0], past[1], key_BMHd, value_BMHd, context_valid_BM)

    def step(self, hidden_RD: Tensor, position: int, cache: BlockCache) -> Tensor:
        """One new token a row: (R, D) -> (R, D); the cache takes it in at `position`."""
        assert self.cross_attention is not None and self.cross_norm is not None
        normed = self._before(self.self_norm, hidden_RD)
        past = cache.write(position, *self.self_attention.keys_values(normed))
        hidden_RD = self._after(self.self_norm, hidden_RD, self.self_attention.step(normed, *past, None))
        normed = self._before(self.cross_norm, hidden_RD)
        attended = self.cross_attention.step(normed, cache.context_key, cache.context_value, cache.context_valid)
        hidden_RD = self._after(self.cross_norm, hidden_RD, attended)
        fed = self.feed_forward(self._before(self.feed_norm, hidden_RD))
        return self._after(self.feed_norm, hidden_RD, fed)

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

    def start(self, context_BMD: Tensor, context_valid_BM: Tensor, length: int, beams: int) -> list[BlockCache]:
        """Caches of all blocks for `length` steps over a padded context, `beams` rows a sample."""
        return [cast(Block, block).cache(context_BMD, context_valid_BM, length, beams) for block in self.blocks]

    def step(self, hidden_RD: Tensor, position: int, caches: list[BlockCache]) -> Tensor:
        """One new token a row through all blocks: (R, D) -> (R, D)."""
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden_RD = cast(Block, block).step(hidden_RD, position, cache)
        return self.final_norm(hidden_RD)
