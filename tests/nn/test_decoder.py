"""The decoder: cached steps equal the packed run; search does what it says."""

import numpy as np
import pytest
import torch

from opt.data.layout import cross_layout, self_layout
from opt.nn.decoder import Decoder
from opt.nn.search import sample


def test_cached_steps_equal_the_packed_run() -> None:
    torch.manual_seed(0)
    decoder, table = Decoder(2, 16, 4, 32, 11, 10, 0.0).eval(), torch.randn(11, 16)
    lengths, context_lengths = np.array([6, 6]), np.array([4, 9])
    context, ids = torch.randn(13, 16), torch.randint(0, 11, (2, 6))
    layout = self_layout(lengths)
    cross = cross_layout(np.array([0, 6]), lengths, np.array([0, 4]), context_lengths)
    hidden = decoder(ids.flatten(), torch.arange(6).repeat(2), layout, context, cross, table)
    packed = decoder.logits(hidden, table).unflatten(0, (2, 6))
    padded = torch.nn.utils.rnn.pad_sequence(list(context.split([4, 9])), batch_first=True)
    valid = torch.arange(9)[None] < torch.tensor([4, 9])[:, None]
    caches = decoder.start(padded, valid)
    stepped = torch.stack([decoder.step(ids[:, place], place, caches, table) for place in range(6)], dim=1)
    torch.testing.assert_close(stepped, packed, atol=1e-5, rtol=1e-4)


def scripted(table: torch.Tensor):
    """A step whose logits depend on position alone: table (L, B, V)."""
    return lambda ids, position: table[position]


def test_greedy_takes_the_likeliest_and_stops_at_the_end() -> None:
    table = torch.full((4, 2, 5), -1.0)
    for position, (first, second) in enumerate([(3, 1), (2, 4), (4, 1), (1, 1)]):
        table[position, 0, first] = table[position, 1, second] = 5.0
    ids = sample(scripted(table), torch.zeros(2, dtype=torch.long), 4, end=4)
    assert ids.tolist() == [[3, 2, 4, 4], [1, 4, 4, 4]]


def test_top_k_draws_only_the_likeliest_and_is_repeatable() -> None:
    table = torch.randn(50, 3, 20, generator=torch.Generator().manual_seed(1))
    start = torch.zeros(3, dtype=torch.long)
    uniform = torch.rand(3, 50, generator=torch.Generator().manual_seed(7))
    drawn = [sample(scripted(table), start, 50, top_k=4, uniform_BL=uniform) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])
    allowed = table.topk(4, dim=-1).indices.permute(1, 0, 2)
    assert (drawn[0][:, :, None] == allowed).any(-1).all()
    assert len(set(drawn[0].flatten().tolist())) > 4


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        sample(scripted(torch.zeros(1, 1, 2)), torch.zeros(1, dtype=torch.long), 1, top_k=0)


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uniform = (torch.arange(1000) / 1000)[:, None]
    start = torch.zeros(1000, dtype=torch.long)
    drawn = sample(lambda ids, place: probability.log().expand(1000, 4), start, 1, top_k=3, uniform_BL=uniform)
    shares = torch.bincount(drawn.flatten(), minlength=4) / 1000
    torch.testing.assert_close(shares, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]), atol=2e-3, rtol=0)
