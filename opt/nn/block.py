"""Transformer block over packed tokens: self-attention, cross-attention, feed-forward; pre- or post-norm.

Shape legend: N tokens, M context tokens, D width; in steps: B samples, R rows (B, or B beams), L length, H heads,
d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.attention import Attention
from opt.nn.dropout import Dropout

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True)
class BlockCache:
    """What a decoding step needs of one block, for R rows: the past, with room for all L steps; the context.

    past_key, past_value (R, L, H, d), filled up to the step at hand. context_key, context_value (B, M, H, d), of which
    context_valid (B, M) are real: a sample's rows share them. None where the block has no such attention.
    """

    past_key: Tensor | None
    past_value: Tensor | None
    context_key: Tensor | None
    context_value: Tensor | None
    context_valid: Tensor

    def write(self, position: int, key_RHd: Tensor, value_RHd: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of a step in their place; returns all up to it, (R, position + 1, H, d)."""
        assert self.past_key is not None and self.past_value is not None
        self.past_key[:, position], self.past_value[:, position] = key_RHd, value_RHd
        return self.past_key[:, : position + 1], self.past_value[:, : position + 1]

    def follow(self, position: int, parents_R: Tensor) -> None:
        """Each row takes over the past of another row (B K rows, a sample's K beside each other) before `position`."""
        for past in (self.past_key, self.past_value):
            if past is not None:
                past[:, :position] = past[parents_R, :position]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): OpenAI's CLIP."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(1.702 * hidden)


class FeedForward(nn.Sequential):
    """Linear, activation, Linear."""

    def __init__(self, width: int, inner: int, activation: Activation = "gelu") -> None:
        between = nn.GELU() if activation == "gelu" else QuickGELU()
        super().__init__(nn.Linear(width, inner), between, nn.Linear(inner, width))


class Block(nn.Module):
    """One layer: self-attention, cross-attention, feed-forward, of which a block may lack one of the first two.

    post_norm: normalises after each residual sum, as BERT; otherwise before each sub-layer. own: has self-attention.
    cross: has cross-attention to a context of `context_width`, which is normalised first with `context_norm`. causal:
    self-attention sees only the past (decoders). writing: has a second self-attention, a causal one with a norm of its
    own, that stands in for the first where the block is told to write; all else is shared (BLIP, section 3.1).
    """

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, post_norm: bool = False, cross: bool = False,
        causal: bool = False, epsilon: float = 1e-5, activation: Activation = "gelu", own: bool = True,
        context_width: int | None = None, context_norm: bool = False, writing: bool = False,
    ) -> None:
        super().__init__()
        self.post_norm, self.causal = post_norm, causal
        self.self_norm = nn.LayerNorm(width, epsilon) if own else None
        self.self_attention = Attention(width, heads) if own else None
        self.writing_norm = nn.LayerNorm(width, epsilon) if writing else None
        self.writing_attention = Attention(width, heads) if writing else None
        self.cross_norm = nn.LayerNorm(width, epsilon) if cross else None
        self.cross_attention = Attention(width, heads, context_width) if cross else None
        self.context_norm = nn.LayerNorm(context_width or width, epsilon) if context_norm else nn.Identity()
        self.feed_norm, self.feed_forward = nn.LayerNorm(width, epsilon), FeedForward(width, inner, activation)
        self.dropout = Dropout(dropout)

    def forward(
        self, hidden_ND: Tensor, layout: AttentionLayout, context_MD: Tensor | None = None,
        context_layout: AttentionLayout | None = None, writing: bool = False,
    ) -> Tensor:
        """(N, D) -> (N, D). Without a context cross-attention is left out."""
        norm, attention, causal = self._own(writing)
        if norm is not None and attention is not None:
            normed = self._before(norm, hidden_ND)
            hidden_ND = self._after(norm, hidden_ND, attention(normed, normed, layout, causal))
        if self.cross_norm is not None and self.cross_attention is not None and context_MD is not None:
            assert context_layout is not None
            attended = self.cross_attention(self._before(self.cross_norm, hidden_ND), self.context_norm(context_MD),
                                            context_layout)
            hidden_ND = self._after(self.cross_norm, hidden_ND, attended)
        fed = self.feed_forward(self._before(self.feed_norm, hidden_ND))
        return self._after(self.feed_norm, hidden_ND, fed)

    def cache(self, context_BMD: Tensor, context_valid_BM: Tensor, length: int, beams: int) -> BlockCache:
        """Room for a past of `length` steps of B x `beams` rows; the context's keys and values, computed once."""
        past_key = past_value = context_key = context_value = None
        if self.cross_attention is not None:
            context_key, context_value = self.cross_attention.keys_values(self.context_norm(context_BMD))
        if self.self_attention is not None:
            width, heads = self.self_attention.output.out_features, self.self_attention.heads
            kind = self.self_attention.output.weight.dtype if context_key is None else context_key.dtype
            past_key, past_value = torch.zeros(2, len(context_BMD) * beams, length, heads, width // heads, dtype=kind,
                                               device=context_BMD.device)
        return BlockCache(past_key, past_value, context_key, context_value, context_valid_BM)

    def step(self, hidden_RD: Tensor, position: int, cache: BlockCache) -> Tensor:
        """One new token a row: (R, D) -> (R, D); the cache takes it in at `position`. A block that can write writes."""
        norm, attention, _ = self._own(writing=self.writing_attention is not None)
        if norm is not None and attention is not None:
            normed = self._before(norm, hidden_RD)
            past = cache.write(position, *attention.keys_values(normed))
            hidden_RD = self._after(norm, hidden_RD, attention.step(normed, *past, None))
        if self.cross_norm is not None and self.cross_attention is not None:
            assert cache.context_key is not None and cache.context_value is not None
            attended = self.cross_attention.step(self._before(self.cross_norm, hidden_RD), cache.context_key,
                                                 cache.context_value, cache.context_valid)
            hidden_RD = self._after(self.cross_norm, hidden_RD, attended)
        fed = self.feed_forward(self._before(self.feed_norm, hidden_RD))
        return self._after(self.feed_norm, hidden_RD, fed)

    def _own(self, writing: bool) -> tuple[nn.LayerNorm | None, Attention | None, bool]:
        """Norm, self-attention and whether it is causal, in this function of the block."""
        if writing and self.writing_attention is not None:
            return self.writing_norm, self.writing_attention, True
        return self.self_norm, self.self_attention, self.causal

    def _before(self, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        return hidden if self.post_norm else norm(hidden)

    def _after(self, norm: nn.LayerNorm, hidden: Tensor, change: Tensor) -> Tensor:
        summed = hidden + self.dropout(change)
        return norm(summed) if self.post_norm else summed


class Stack(nn.Module):
    """Blocks in order; a pre-norm stack ends in a norm. settings: those of Block that not every stack has."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, dropout: float, post_norm: bool = False,
                 cross: bool = False, causal: bool = False, epsilon: float = 1e-5, **settings: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, inner, dropout, post_norm, cross, causal, epsilon, **settings) for _ in range(layers)
        )
        self.final_norm = nn.Identity() if post_norm else nn.LayerNorm(width, epsilon)

    def forward(
        self, hidden_ND: Tensor, layout: AttentionLayout, context_MD: Tensor | None = None,
        context_layout: AttentionLayout | None = None, writing: bool = False,
    ) -> Tensor:
        """(N, D) -> (N, D)."""
        for block in self.blocks:
            hidden_ND = block(hidden_ND, layout, context_MD, context_layout, writing)
        return self.final_norm(hidden_ND)

    def start(self, context_BMD: Tensor, context_valid_BM: Tensor, length: int, beams: int) -> list[BlockCache]:
        """Caches of all blocks for `length` steps over a padded context, `beams` rows a sample."""
        return [cast(Block, block).cache(context_BMD, context_valid_BM, length, beams) for block in self.blocks]

    def step(self, hidden_RD: Tensor, position: int, caches: list[BlockCache]) -> Tensor:
        """One new token a row through all blocks: (R, D) -> (R, D)."""
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden_RD = cast(Block, block).step(hidden_RD, position, cache)
        return self.final_norm(hidden_RD)
