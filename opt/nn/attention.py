"""Attention over packed tokens: self, cross and causal.

    CUDA, half precision   one kernel call for sequences of all lengths, no padding (torch's varlen_attn)
    otherwise              gather -> one dense call a bucket of like lengths -> gather back

The only module that computes attention; where sequences begin comes from opt.data.layout.
Shape legend: N query tokens, M key tokens, K key tokens in the order of pairs, H heads, d head width, D = H d, b pairs
in a bucket, L padded length, P and Q dense queries and keys of all buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.layout import AttentionLayout, Bucket

if torch.cuda.is_available():  # two seconds of imports for a kernel that nothing else has
    from torch.nn.attention.varlen import varlen_attn


class _Gather(torch.autograd.Function):
    """tokens (N, ...) -> dense (b L, ...), where `inverse` (N,) says which dense row is each token's own.

    Its gradient is a gather too: padding repeats a token but its gradient is zero by construction (masked as key,
    dropped as query). So no scatter-add is needed, whose order of summation is not the same twice on several threads.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class _Return(torch.autograd.Function):
    """dense (P, ...) -> tokens (N, ...) by `inverse`: what padding computed is dropped, and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = len(dense)
        return dense.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        dense = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return dense.index_copy_(0, inverse, gradient), None


def attend(
    query_ND: Tensor, key_value_M2D: Tensor, heads: int, layout: AttentionLayout, causal: bool,
    bias: Sequence[Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention of packed queries over packed keys: (N, D).

    key_value_M2D: keys beside values. causal: a query sees keys up to its own place; query and key sequences must then
    be the same. bias: added to the scores of each bucket of the layout, (b, H, L, L) or what broadcasts to it; -inf
    where a query must not look, padding included. No kernel takes it, so that it is by buckets on every device.
    """
    if len(query_ND) == 0:  # no sequence in this batch: an empty result that still uses every projection
        return query_ND + key_value_M2D[:0, : query_ND.shape[1]]
    if bias is None and _has_kernel(query_ND, heads):
        return _attend_packed(query_ND, key_value_M2D, heads, layout, causal)
    return _attend_in_buckets(query_ND, key_value_M2D, heads, layout, causal, bias)


def _has_kernel(query_ND: Tensor, heads: int) -> bool:
    """Whether a kernel takes sequences of any lengths as they lie: on CUDA, in half precision, for heads of 8 n."""
    half = query_ND.dtype in (torch.bfloat16, torch.float16)
    return query_ND.is_cuda and half and query_ND.shape[1] // heads % 8 == 0


def _attend_packed(
    query_ND: Tensor, key_value_M2D: Tensor, heads: int, layout: AttentionLayout, causal: bool
) -> Tensor:
    """No padding, no copies; torch.compile sees one operation, whatever the lengths."""
    key_value_K2D = key_value_M2D
    if layout.place is not None:
        query_ND, key_value_K2D = (F.embedding(layout.place, each) for each in (query_ND, key_value_M2D))
    if layout.key_order is not None:
        key_value_K2D = F.embedding(layout.key_order, key_value_M2D)
    key_KHd, value_KHd = key_value_K2D.unflatten(-1, (2 * heads, -1)).chunk(2, dim=1)
    output_NHd = cast(Tensor, varlen_attn(
        query_ND.unflatten(-1, (heads, -1)), key_KHd, value_KHd, layout.query_borders, layout.key_borders,
        layout.longest.shape[0], layout.longest.shape[1], window_size=(-1, 0) if causal else (-1, -1),
    ))
    output_ND = output_NHd.flatten(1)
    return output_ND if layout.order is None else F.embedding(layout.order, output_ND)


@torch.compiler.disable
def _attend_in_buckets(
    query_ND: Tensor, key_value_M2D: Tensor, heads: int, layout: AttentionLayout, causal: bool,
    bias: Sequence[Tensor] | None,
) -> Tensor:
    """Buckets differ from batch to batch, so compiled blocks step out of their graph here."""
    biases = bias if bias is not None else [None] * len(layout.buckets)
    in_order = layout.key is None and layout.order is None
    if in_order and len(layout.buckets) == 1 and len(layout.query) == len(layout.inverse):  # all of one length
        return _attend_dense(query_ND, key_value_M2D, heads, layout.buckets[0], causal, biases[0])
    query_PD = _Gather.apply(query_ND, layout.query, layout.inverse)
    if layout.key is None:
        key_value_Q2D = _Gather.apply(key_value_M2D, layout.query, layout.inverse)
    else:  # a key sequence may serve several queries: embedding's gradient sums them in a fixed order
        key_value_Q2D = F.embedding(layout.key, key_value_M2D)
    queries = query_PD.split([bucket.rows * bucket.queries for bucket in layout.buckets])
    keys_values = key_value_Q2D.split([bucket.rows * bucket.keys for bucket in layout.buckets])
    outputs = [
        _attend_dense(query, key_value, heads, bucket, causal, bias)
        for query, key_value, bucket, bias in zip(queries, keys_values, layout.buckets, biases, strict=True)
    ]
    return _Return.apply(torch.cat(outputs), layout.inverse)


def _attend_dense(
    query_PD: Tensor, key_value_Q2D: Tensor, heads: int, bucket: Bucket, causal: bool, bias: Tensor | None
) -> Tensor:
    query_bHLd = query_PD.view(bucket.rows, bucket.queries, heads, -1).transpose(1, 2)
    key_value_bHLd = key_value_Q2D.view(bucket.rows, bucket.keys, 2 * heads, -1).transpose(1, 2)
    key_bHLd, value_bHLd = key_value_bHLd.chunk(2, dim=1)
    # Padding lies behind every real query of its row, so the causal mask alone already hides it.
    mask = None if causal or bucket.valid is None else bucket.valid[:, None, None, :]
    if bias is not None:
        assert not causal
        mask = bias.to(query_bHLd.dtype)
    if query_PD.dtype == torch.bfloat16 and query_PD.device.type == "cpu":
        output_bHLd = _attend_by_products(query_bHLd, key_bHLd, value_bHLd, mask, causal)
    else:
        output_bHLd = F.scaled_dot_product_attention(query_bHLd, key_bHLd, value_bHLd, attn_mask=mask, is_causal=causal)
    return output_bHLd.transpose(1, 2).reshape(len(query_PD), -1)


def _attend_by_products(query_bHLd: Tensor, key_bHLd: Tensor, value_bHLd: Tensor, mask: Tensor | None, causal: bool
                        ) -> Tensor:
    """Two matrix products and a softmax: on CPUs in bfloat16 several times faster than torch's fused kernel, whose
    backward pass takes most of the time (docs/results/packed.md)."""
    scores_bHLL = (query_bHLd * query_bHLd.shape[-1] ** -0.5) @ key_bHLd.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores_bHLL.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype != torch.bool:  # in place, as below: products need not know what they gave
        scores_bHLL += mask
    elif mask is not None:  # added in place: nothing is copied, and the backward pass need not know of it
        scores_bHLL += torch.zeros(mask.shape, dtype=scores_bHLL.dtype).masked_fill_(~mask, float("-inf"))
    return scores_bHLL.softmax(dim=-1) @ value_bHLd


class Attention(nn.Module):
    """Multi-head attention with its projections (Vaswani et al. 2017), over packed tokens or one step with a cache.

    context_width: of what keys and values come from, where it is not `width`.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden_ND: Tensor, context_MD: Tensor, layout: AttentionLayout, causal: bool = False
    ) -> Tensor:
        """Queries from `hidden_ND`, keys and values from `context_MD` (the same tensor for self-attention): (N, D)."""
        attended_ND = attend(self.query(hidden_ND), self.key_value(context_MD), self.heads, layout, causal)
        return self.output(attended_ND)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, d) of a context (..., D)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def step(self, hidden_RD: Tensor, key_BLHd: Tensor, value_BLHd: Tensor, valid_BL: Tensor | None) -> Tensor:
        """One query a row over cached keys and values: (R, D). R is B, or B K where K rows beside each other share
        theirs. valid_BL bool, True = may attend."""
        query_BKHd = self.query(hidden_RD).unflatten(0, (len(key_BLHd), -1)).unflatten(-1, (self.heads, -1))
        mask = None if valid_BL is None else valid_BL[:, None, None, :]
        output_BHKd = F.scaled_dot_product_attention(
            query_BKHd.transpose(1, 2), key_BLHd.transpose(1, 2), value_BLHd.transpose(1, 2), attn_mask=mask
        )
        return self.output(output_BHKd.transpose(1, 2).reshape(hidden_RD.shape))
