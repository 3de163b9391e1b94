"""Packed attention equals dense attention, sequence by sequence, forward and backward."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import varlen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from opt.data.batch import _apply
from opt.data.layout import AttentionLayout, cross_layout, self_layout
from opt.nn import attention
from opt.nn.attention import Attention, _has_kernel, attend
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


def shared_contexts() -> tuple[np.ndarray, AttentionLayout]:
    """Four query sequences, two of which look at the same of seven contexts: their lengths, and the layout."""
    query_lengths, chosen = np.array([4, 9, 2, 5]), np.array([2, 2, 0, 5])
    starts = np.cumsum(LENGTHS) - LENGTHS
    return query_lengths, cross_layout(
        np.cumsum(query_lengths) - query_lengths, query_lengths, starts[chosen], LENGTHS[chosen])


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_the_kernel_for_any_lengths_equals_the_buckets(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    total = int(LENGTHS.sum())
    query_lengths, layout = shared_contexts() if kind == "cross" else (LENGTHS, self_layout(LENGTHS))
    layer, hidden = Attention(32, 4), torch.randn(int(query_lengths.sum()), 32, requires_grad=True)
    context = torch.randn(total, 32, requires_grad=True) if kind == "cross" else hidden

    def step() -> tuple[torch.Tensor, ...]:
        output = layer(hidden, context, layout, kind == "causal")
        return output, *torch.autograd.grad(output.square().sum(), (hidden, context, *layer.parameters()))

    in_buckets = step()
    calls = varlen.use(monkeypatch)
    for first, second in zip(in_buckets, step(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
    assert calls == [(9, 30)] if kind == "cross" else calls == [(30, 30)]


def test_only_a_gpu_in_half_precision_has_that_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not _has_kernel(torch.zeros(3, 16, dtype=dtype), 2)
    with FakeTensorMode():  # knows devices that are not there
        for dtype, width, has in ((torch.bfloat16, 16, True), (torch.float16, 64, True), (torch.float32, 16, False),
                                  (torch.bfloat16, 24, False)):
            assert _has_kernel(torch.zeros(3, width, dtype=dtype, device="cuda"), 2) is has


def test_on_a_gpu_the_kernel_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone: no GPU is needed, and none is asked for a result."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn, raising=False)
    layouts = [(self_layout(LENGTHS), int(LENGTHS.sum()), False), (self_layout(LENGTHS), int(LENGTHS.sum()), True),
               (shared_contexts()[1], 20, False)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for layout, queries, causal in layouts:
            there = _apply(layout, lambda tensor: torch.empty_like(mode.from_tensor(tensor), device="cuda"))
            query = torch.empty(queries, 32, dtype=torch.bfloat16, device="cuda")
            key_value = query.new_empty(int(LENGTHS.sum()), 64)
            with Operations() as seen:
                output = attend(query, key_value, 4, there, causal)
            assert output.shape == query.shape and output.dtype == torch.bfloat16
            assert sum("varlen" in name for name in seen.names) == 1
            assert not any("index" in name or "softmax" in name or "scaled" in name for name in seen.names)


class Operations(TorchDispatchMode):
    """Names of the operations that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_products_in_bfloat16_equal_torchs_attention_up_to_rounding(kind: str) -> None:
    torch.manual_seed(0)
    query_lengths, layout = shared_contexts() if kind == "cross" else (LENGTHS, self_layout(LENGTHS))
    query = torch.randn(int(query_lengths.sum()), 32, dtype=torch.bfloat16, requires_grad=True)
    key_value = torch.randn(int(LENGTHS.sum()), 64, dtype=torch.bfloat16, requires_grad=True)
    exact = query.detach().double().requires_grad_(), key_value.detach().double().requires_grad_()
    rounded = attend(query, key_value, 4, layout, kind == "causal")
    wanted = attend(exact[0], exact[1], 4, layout, kind == "causal")
    weight = torch.randn(wanted.shape)
    gradients = torch.autograd.grad((rounded * weight).sum(), (query, key_value))
    for got, expected in zip((rounded, *gradients),
                             (wanted, *torch.autograd.grad((wanted * weight).sum(), exact)), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.05)
        assert (got.double() - expected).square().mean() < 5e-5 * expected.square().mean()


def test_gradients_are_the_same_twice_where_keys_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scatter-add of several threads would sum in any order."""
    varlen.use(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "index_add_", None)
    lengths, chosen = np.full(40, 7), np.zeros(40, np.int64)
    layout = cross_layout(np.arange(40) * 7, lengths, chosen, np.full(40, 30))
    torch.manual_seed(0)
    query, key_value = torch.randn(280, 16), torch.randn(30, 32, requires_grad=True)
    first, second = (torch.autograd.grad(attend(query, key_value, 2, layout, False).square().sum(), key_value)[0]
                     for _ in range(2))
    assert torch.equal(first, second)


def test_a_layout_counts_real_work() -> None:
    query_lengths, layout = shared_contexts()
    assert layout.pairs == int((query_lengths * LENGTHS[[2, 2, 0, 5]]).sum())
    assert self_layout(LENGTHS).pairs == int((LENGTHS**2).sum())
    assert self_layout(LENGTHS).padded == len(self_layout(LENGTHS).query) >= LENGTHS.sum()
    assert self_layout(np.full(4, 6)).padded == 24


def test_queries_that_are_not_all_tokens_in_order_are_refused() -> None:
    with pytest.raises(ValueError, match="all tokens"):
        cross_layout(np.array([3, 0]), np.array([2, 3]), np.array([0, 3]), np.array([3, 3]))


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
