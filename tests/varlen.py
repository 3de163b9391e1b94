"""A stand-in for torch's varlen attention kernel, which only CUDA has: its documented contract, sequence by sequence.

As the real one it is an opaque operation with a backward operation of its own, so torch.compile treats it alike.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from opt.nn import attention


def use(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Attention takes this kernel, whatever device and precision. Returns the bounds of every call."""
    calls.clear()
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr(attention, "_has_kernel", lambda query, heads: True)
    return calls


def varlen_attn(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
                *, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """Queries (N, H, d), keys and values (K, H, d): (N, H, d)."""
    assert window_size in ((-1, -1), (-1, 0))
    return torch.ops.opt_test.varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


calls: list[tuple[int, int]] = []


@torch.library.custom_op("opt_test::varlen", mutates_args=())
def _varlen(query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor, max_q: int,
            max_k: int, causal: bool) -> Tensor:
    calls.append((max_q, max_k))
    sequences = zip(*_sequences(query, key, value, query_borders, key_borders, max_q, max_k), strict=True)
    return torch.cat([(_weights(query_HLd, key_HLd, causal) @ value_HLd).transpose(0, 1)
                      for query_HLd, key_HLd, value_HLd in sequences])


@torch.library.custom_op("opt_test::varlen_backward", mutates_args=())
def _varlen_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor,
                     key_borders: Tensor, max_q: int, max_k: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    sequences = zip(*_sequences(query, key, value, query_borders, key_borders, max_q, max_k),
                    gradient.split(torch.diff(query_borders).tolist()), strict=True)
    found: tuple[list[Tensor], ...] = ([], [], [])
    for query_HLd, key_HLd, value_HLd, gradient_LHd in sequences:
        gradient_HLd, weights = gradient_LHd.transpose(0, 1), _weights(query_HLd, key_HLd, causal)
        by_weights = gradient_HLd @ value_HLd.transpose(1, 2)
        scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True)) / query.shape[-1] ** 0.5
        for part, one in zip(found, (scores @ key_HLd, scores.transpose(1, 2) @ query_HLd,
                                     weights.transpose(1, 2) @ gradient_HLd), strict=True):
            part.append(one.transpose(0, 1))
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2])


def _weights(query_HLd: Tensor, key_HLd: Tensor, causal: bool) -> Tensor:
    scores = query_HLd @ key_HLd.transpose(1, 2) / query_HLd.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1)


def _sequences(query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor, max_q: int,
               max_k: int) -> tuple[list[Tensor], ...]:
    """Queries, keys and values (H, L, d) of every sequence; refuses what the kernel would read wrongly."""
    for borders, tokens, longest in ((query_borders, query, max_q), (key_borders, key, max_k)):
        lengths = torch.diff(borders)
        assert borders.dtype == torch.int32 and borders[0] == 0 and borders[-1] == len(tokens)
        assert lengths.min() >= 1, "cuDNN before 9.25 gives NaN where a sequence is empty"
        assert lengths.max() <= longest
    assert len(key_borders) == len(query_borders) and len(value) == len(key)
    pieces = ((query, query_borders), (key, key_borders), (value, key_borders))
    return tuple([each.transpose(0, 1) for each in tokens.split(torch.diff(borders).tolist())]
                 for tokens, borders in pieces)


@_varlen.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor, max_q: int, max_k: int,
      causal: bool) -> Tensor:
    return torch.empty_like(query)


@_varlen_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor,
      max_q: int, max_k: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.opt_test.varlen_backward(gradient, *ctx.saved_tensors, *ctx.rest), *[None] * 5


_varlen.register_autograd(_gradients, setup_context=_save)
