"""The decoder: cached steps equal the packed run, no token sees the future, and beams carry their own past."""

import numpy as np
import pytest
import torch

from opt.data.layout import cross_layout, self_layout
from opt.nn.decoder import Decoder, TiedDecoder
from opt.nn.search import Step, beam, draw, greedy

CONTEXTS = np.array([4, 9, 1])


def made() -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """A random decoder whose logits differ clearly, its token table, and a packed context."""
    torch.manual_seed(0)
    decoder = Decoder(2, 16, 4, 32, 11, 64, 0.0).eval()
    return decoder, torch.randn(12, 16), 3 * torch.randn(int(CONTEXTS.sum()), 16)


def packed(decoder: Decoder, table: torch.Tensor, context: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states (B K, L, D) of all positions at once, K rows a context."""
    rows, length = ids.shape
    each = np.arange(rows) // (rows // len(CONTEXTS))
    lengths = np.full(rows, length)
    cross = cross_layout(np.arange(rows) * length, lengths, (np.cumsum(CONTEXTS) - CONTEXTS)[each], CONTEXTS[each])
    places = torch.arange(length).repeat(rows)
    return decoder(ids.flatten(), places, self_layout(lengths), context, cross, table).unflatten(0, (rows, length))


def cached_step(decoder: Decoder, table: torch.Tensor, context: torch.Tensor, length: int, beams: int) -> Step:
    padded = torch.nn.utils.rnn.pad_sequence(list(context.split(CONTEXTS.tolist())), batch_first=True)
    valid = torch.arange(padded.shape[1])[None] < torch.from_numpy(CONTEXTS)[:, None]
    writer = TiedDecoder(decoder, table)
    caches = writer.start(padded, valid, length, beams)
    return lambda ids, position, parents: writer.step(ids, position, caches, parents)


def uncached_step(decoder: Decoder, table: torch.Tensor, context: torch.Tensor, beams: int) -> Step:
    """Everything computed anew at every step."""
    prefix = [torch.zeros(len(CONTEXTS) * beams, 0, dtype=torch.long)]

    def step(ids: torch.Tensor, position: int, parents: torch.Tensor | None) -> torch.Tensor:
        past = prefix[0] if parents is None else prefix[0][parents]
        prefix[0] = torch.cat([past, ids[:, None]], dim=1)
        return decoder.logits(packed(decoder, table, context, prefix[0])[:, -1], table)

    return step


@torch.inference_mode()
def test_cached_steps_equal_the_packed_run() -> None:
    decoder, table, context = made()
    ids = torch.randint(0, 11, (3, 6))
    step = cached_step(decoder, table, context, 6, 1)
    stepped = torch.stack([step(ids[:, place], place, None) for place in range(6)], dim=1)
    whole = decoder.logits(packed(decoder, table, context, ids), table)
    torch.testing.assert_close(stepped, whole, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("end, length", [(7, 20), (None, 64)])
def test_cached_search_equals_uncached(end: int | None, length: int) -> None:
    """Text, which ends, and codes, which fill their grid, over contexts of unequal length."""
    decoder, table, context = made()
    start = torch.full((3,), 11)
    uniform = torch.rand(3, length, dtype=torch.float64)
    for search in (lambda step: greedy(step, start, length, end),
                   lambda step: draw(step, start, length, uniform, 5, 0.95, 1.2, end)):
        with_cache = search(cached_step(decoder, table, context, length, 1))
        assert torch.equal(with_cache, search(uncached_step(decoder, table, context, 1)))
        assert len(with_cache.unique()) > 2
    found = [beam(step, start, length, 3, 1.0, end, keep=3) for step in (
        cached_step(decoder, table, context, length, 3), uncached_step(decoder, table, context, 3))]
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_no_position_sees_a_later_token() -> None:
    decoder, table, context = made()
    ids = torch.randint(0, 11, (3, 8))
    before = packed(decoder, table, context, ids)
    for place in range(8):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 11
        after = packed(decoder, table, context, other)
        assert torch.equal(after[:, :place], before[:, :place]), "bit-equal"
        assert (after[:, place:] != before[:, place:]).any(dim=-1).all()
