"""Packed attention equals dense attention, sequence by sequence, forward and backward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opt.data.layout import cross_layout, self_layout
from opt.nn.attention import Attention
from opt.nn.block import Block, Stack

LENGTHS = np.array([7, 1, 30, 12, 29, 3, 12])


def reference(layer: Attention, query: torch.Tensor, context: torch.Tensor, causal: bool) -> torch.Tensor:
    """The same projections with torch's own multi-head attention, one sequence at a time."""
    key, value = layer.key_value(context).chunk(2, dim=-1)
    split = [part.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for part in (layer.query(query), key, value)]
    scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return layer.output((scores.softmax(-1) @ split[2]).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_each_sequence_alone(causal: bool) -> None:
    torch.manual_seed(0)
    layer, hidden = Attention(16, 4), torch.randn(int(LENGTHS.sum()), 16, requires_grad=True)
    weight = torch.randn(int(LENGTHS.sum()), 16)
    packed = layer(hidden, hidden, self_layout(LENGTHS), causal)
    (packed_gradient,) = torch.autograd.grad((packed * weight).sum(), hidden)
    alone = torch.cat([reference(layer, part, part, causal) for part in hidden.split(LENGTHS.tolist())])
    (gradient,) = torch.autograd.grad((alone * weight).sum(), hidden)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_cross_attention_equals_each_pair_alone_even_when_queries_share_a_context() -> None:
    torch.manual_seed(0)
    layer, context = Attention(16, 2), torch.randn(int(LENGTHS.sum()), 16, requires_grad=True)
    starts = np.cumsum(LENGTHS) - LENGTHS
    chosen = np.array([2, 2, 0, 5])
    query_lengths = np.array([4, 9, 2, 5])
    query = torch.randn(int(query_lengths.sum()), 16, requires_grad=True)
    layout = cross_layout(np.cumsum(query_lengths) - query_lengths, query_lengths, starts[chosen], LENGTHS[chosen])
    packed = layer(query, context, layout)
    parts = context.split(LENGTHS.tolist())
    alone = torch.cat([
        reference(layer, one, parts[number], False)
        for one, number in zip(query.split(query_lengths.tolist()), chosen, strict=True)
    ])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    for got, wanted in zip(torch.autograd.grad(packed.square().sum(), (query, context), retain_graph=True),
                           torch.autograd.grad(alone.square().sum(), (query, context)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_causal_stack_never_looks_ahead() -> None:
    torch.manual_seed(0)
    stack = Stack(2, 16, 4, 32, 0.0, causal=True).eval()
    hidden = torch.randn(12, 16)
    layout = self_layout(np.array([12]))
    changed = hidden.clone()
    changed[7] = torch.randn(16)
    before, after = stack(hidden, layout), stack(changed, layout)
    assert torch.equal(before[:7], after[:7])
    assert not torch.allclose(before[7:], after[7:])


def test_order_of_sequences_does_not_matter() -> None:
    torch.manual_seed(0)
    block, hidden = Block(16, 4, 32, 0.0).eval(), torch.randn(int(LENGTHS.sum()), 16)
    order = [3, 0, 6, 2, 1, 5, 4]
    parts = hidden.split(LENGTHS.tolist())
    outputs = block(hidden, self_layout(LENGTHS)).split(LENGTHS.tolist())
    moved = block(torch.cat([parts[i] for i in order]), self_layout(LENGTHS[order])).split(LENGTHS[order].tolist())
    for place, number in enumerate(order):
        torch.testing.assert_close(moved[place], outputs[number], atol=1e-5, rtol=1e-4)


def test_post_norm_block_equals_pytorchs_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = Block(16, 4, 32, 0.0, post_norm=True)
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, F.gelu, batch_first=True)
    attention = ours.self_attention
    theirs.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([attention.query.weight, attention.key_value.weight]),
        "self_attn.in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
        "self_attn.out_proj.weight": attention.output.weight, "self_attn.out_proj.bias": attention.output.bias,
        "linear1.weight": ours.feed_forward[0].weight, "linear1.bias": ours.feed_forward[0].bias,
        "linear2.weight": ours.feed_forward[2].weight, "linear2.bias": ours.feed_forward[2].bias,
        "norm1.weight": ours.self_norm.weight, "norm1.bias": ours.self_norm.bias,
        "norm2.weight": ours.feed_norm.weight, "norm2.bias": ours.feed_norm.bias,
    })
    hidden = torch.randn(9, 16)
    torch.testing.assert_close(ours(hidden, self_layout(np.array([9]))), theirs(hidden[None])[0], atol=1e-5, rtol=1e-4)


def test_no_sequences_use_every_projection() -> None:
    layer, context = Attention(16, 4), torch.randn(5, 16)
    empty = np.zeros(0, np.int64)
    output = layer(torch.zeros(0, 16), context, cross_layout(empty, empty, empty, empty))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        self_layout(np.array([3, 0, 2]))
