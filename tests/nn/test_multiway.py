"""Experts over packed tokens against each sequence and each token by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import varlen

from opt.data.capacity import Filled
from opt.data.pack import FRAME, MODALITY, PATCH, TEXT
from opt.nn.init import by_width
from opt.nn.multiway import KINDS, Experts, MultiwayStack, Route, Switch
from opt.nn.relative import RelativePositions, dense, prefix
from opt.nn.states import States, side_by_side

WIDTH, HEADS = 8, 2
OWN = {kind: kind.removeprefix("fused ") for kind in KINDS}
UPPER = OWN | {kind: "fused" for kind in KINDS if kind.startswith("fused")}
LENGTHS = {"text": [3, 0, 4, 2, 0], "image": [5, 5, 0, 5, 0], "audio": [0, 2, 0, 6, 3]}
TABLES = [TEXT, PATCH, FRAME]


def sequences():
    """Five sequences: pairs, one modality alone, all three."""
    torch.manual_seed(0)
    parts = [States(torch.randn(sum(LENGTHS[name]), WIDTH), np.array(LENGTHS[name])) for name in MODALITY.values()]
    return side_by_side(parts, TABLES)


def stack(everything: bool = False, **settings) -> MultiwayStack:
    torch.manual_seed(1)
    lower, upper = (Switch(serves, serves if everything else {}) for serves in (OWN, UPPER))
    made = MultiwayStack(WIDTH, HEADS, 16, [lower, upper], OWN if everything else {}, **settings)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def expert_of(experts: Experts, kind: str) -> torch.nn.Module:
    return experts.each[experts.serves.get(kind, "shared")]


def by_hand(made: MultiwayStack, hidden: torch.Tensor, kinds: list[str], bias=None) -> torch.Tensor:
    """One sequence, each token through its experts by itself."""
    for number, block in enumerate(made.blocks):
        def each(experts, tokens):
            return torch.stack([expert_of(experts, kind)(token) for token, kind in zip(tokens, kinds, strict=True)])

        attention = block.self_attention
        normed = each(block.self_norm, hidden)
        query, key_value = each(attention.query, normed), each(attention.key_value, normed)
        key, value = key_value.chunk(2, dim=-1)
        query, key, value = (one.unflatten(-1, (HEADS, -1)).transpose(0, 1) for one in (query, key, value))
        scores = query @ key.mT / (WIDTH / HEADS) ** 0.5
        attended = (scores + (0 if bias is None else bias[number])).softmax(-1) @ value
        attended = attended.transpose(0, 1).flatten(1)
        if attention.inner_norm is not None:
            attended = each(attention.inner_norm, attended)
        change = each(attention.output, attended)
        hidden = hidden + (change if block.self_scale is None else block.self_scale * change)
        change = each(block.feed_forward, each(block.feed_norm, hidden))
        hidden = hidden + (change if block.feed_scale is None else block.feed_scale * change)
    return torch.stack([expert_of(made.final_norm, kind)(token) for token, kind in zip(hidden, kinds, strict=True)])


def kinds_of(view) -> list[list[str]]:
    """By sequence, the kind of each token."""
    found, start = [], 0
    for length in view.lengths:
        names = [MODALITY[int(table)] for table in view.tables[start : start + length]]
        found.append([("fused " if len(set(names)) > 1 else "") + name for name in names])
        start += length
    return found


@pytest.mark.parametrize("settings", [{}, {"everything": True, "inner_norm": True}, {"layer_scale": 0.1}])
def test_packed_experts_are_those_of_each_token(settings) -> None:
    made, (entries, view) = stack(**settings), sequences()
    found = made(entries, view)
    for got, own, kinds in zip(found.split(view.lengths.tolist()), entries.split(view.lengths.tolist()),
                               kinds_of(view), strict=True):
        torch.testing.assert_close(got, by_hand(made, own, kinds), rtol=1e-4, atol=1e-5)


def test_the_kernel_for_any_lengths_finds_sorted_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (entries, view) = stack(), sequences()

    def step() -> list[torch.Tensor]:
        given = entries.clone().requires_grad_()
        output = made(given, view)
        return [output, *torch.autograd.grad(output.square().sum(), (given, *made.blocks[0].parameters()))]

    in_buckets = step()
    calls = varlen.use(monkeypatch)
    for first, second in zip(in_buckets, step(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)
    assert len(calls) == 2


def test_a_token_comes_to_no_expert_but_its_own() -> None:
    made, (entries, view) = stack(), sequences()
    alone = [number for number, kinds in enumerate(kinds_of(view)) if set(kinds) <= {"image", "audio"}]
    before = made(entries, view).split(view.lengths.tolist())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".text." in name or ".fused." in name:
                parameter += 1
    after = made(entries, view).split(view.lengths.tolist())
    assert alone and all(torch.equal(before[number], after[number]) for number in alone)
    assert not any(torch.equal(one, other) for number, (one, other) in enumerate(zip(before, after, strict=True))
                   if number not in alone)


def test_idle_experts_have_gradients_of_zero() -> None:
    made = stack(everything=True)
    made(*side_by_side([States(torch.randn(6, WIDTH), np.array([4, 2]))], [PATCH])).sum().backward()
    idle = [parameter.grad for name, parameter in made.named_parameters() if ".text." in name]
    assert idle and all(gradient is not None and not gradient.any() for gradient in idle)


@pytest.mark.parametrize("training", [True, False])
def test_no_sequences_are_no_states(training: bool) -> None:
    none = States(torch.zeros(0, WIDTH), np.zeros(0, np.int64))
    with torch.set_grad_enabled(training):
        assert stack(everything=True, inner_norm=True)(*side_by_side([none], [PATCH])).shape == (0, WIDTH)


def test_all_tokens_can_be_taken_for_fused_ones() -> None:
    made, (entries, view) = stack(), sequences()
    route = Route.of(view)
    assert sum(route.sizes) == len(entries)
    assert set(route.as_fused().kinds) == {kind for kind in KINDS if kind.startswith("fused")}
    layout = view.layout.sorted_by(route.order, route.place)
    upper = made.run(entries[route.order], layout, route.as_fused(), first=1)
    made.blocks[1].feed_forward.each["text"] = torch.nn.Identity()
    assert torch.equal(made.run(entries[route.order], layout, route.as_fused(), first=1), upper)


def test_filler_changes_nothing() -> None:
    made, (entries, view) = stack(), sequences()
    relative = RelativePositions(2, 4, 7, HEADS, 2)
    for piece in relative.table.values():
        torch.nn.init.normal_(piece)

    class Given:
        tasks, jpeg = None, False

    filled = Filled(Given(), 64)._view(view)
    assert len(filled.tables) == len(filled.gather) > len(view.gather)
    torch.testing.assert_close(made(entries[filled.gather], filled)[: len(entries)], made(entries, view))
    torch.testing.assert_close(made(entries[filled.gather], filled, relative(filled))[: len(entries)],
                               made(entries, view, relative(view)))


def test_relative_positions_are_looked_up_for_each_pair_of_tokens() -> None:
    """Against the plain rule: rows and columns apart, words apart, or which modalities."""
    grid, texts, frames = 2, 4, 7
    relative = RelativePositions(grid, texts, frames, HEADS, 2)
    for piece in relative.table.values():
        torch.nn.init.normal_(piece)
    table_RX = torch.cat([relative.table[name] for name in ("image", "text", "audio", "across")])
    made, (entries, view) = stack(), sequences()
    bias = relative(view)
    found = made(entries, view, relative(view))
    for got, own, kinds in zip(found.split(view.lengths.tolist()), entries.split(view.lengths.tolist()),
                               kinds_of(view), strict=True):
        names = [kind.removeprefix("fused ") for kind in kinds]
        at = [names[:number].count(name) for number, name in enumerate(names)]
        by_layer = [torch.zeros(HEADS, len(own), len(own)) for _ in range(2)]
        for layer in range(2):
            table = table_RX[:, layer * HEADS : (layer + 1) * HEADS]
            for query in range(len(own)):
                for key in range(len(own)):
                    row = _row(names[query], names[key], at[query], at[key], grid, texts, frames)
                    by_layer[layer][:, query, key] = table[row]
        torch.testing.assert_close(got, by_hand(made, own, kinds, by_layer), rtol=1e-4, atol=1e-5)
    assert all(one.shape[1] == HEADS for one in bias(0))


def _row(query: str, key: str, at: int, other: int, grid: int, texts: int, frames: int) -> int:
    square = (2 * grid - 1) ** 2
    words = square + 3
    heard = words + 2 * texts
    crossed = heard + 2 * frames + 2
    if query != key:
        names = ["text", "image", "audio"]
        return crossed + [(a, b) for a in names for b in names if a != b].index((query, key))
    begin, count = {"text": (words, 2 * texts - 3), "audio": (heard, 2 * frames - 1), "image": (0, square)}[query]
    if at == 0 or other == 0:
        return begin + count + (2 if at == other else 0 if at == 0 else 1)
    if query != "image":
        return begin + at - other + count // 2
    rows = (at - 1) // grid - (other - 1) // grid + grid - 1
    columns = (at - 1) % grid - (other - 1) % grid + grid - 1
    return rows * (2 * grid - 1) + columns


def test_with_a_prefix_pictures_do_not_see_what_is_written() -> None:
    made = stack()
    torch.manual_seed(3)
    image, text = States(torch.randn(7, WIDTH), np.array([4, 3])), States(torch.randn(5, WIDTH), np.array([3, 2]))
    entries, view = side_by_side([image, text], [PATCH, TEXT])
    writes = torch.from_numpy(view.tables == TEXT)
    before = made(entries, view, prefix(writes, view.layout))
    changed = entries.clone()
    changed[5] += 1  # the first sequence's second word
    after = made(changed, view, prefix(writes, view.layout))
    same = (before == after).all(dim=1)
    assert same.tolist() == [True] * 5 + [False] * 2 + [True] * 5


def test_dense_places_are_those_of_the_tokens() -> None:
    _, view = sequences()
    number = torch.arange(int(view.lengths.sum()))
    back = torch.cat([each.flatten() for each in dense(number, view.layout)])[view.layout.inverse]
    assert torch.equal(back, number)


def test_new_weights_leave_the_variance_of_states_about_the_same() -> None:
    made = MultiwayStack(64, 4, 256, [Switch(OWN, {})] * 4, {})
    made.apply(by_width)
    hidden = torch.randn(40, 64)
    entries, view = side_by_side([States(hidden, np.array([20, 20]))], [PATCH])
    route = Route.of(view)
    states = made.run(entries, view.layout.sorted_by(route.order, route.place), route)
    assert 1 < states.std() / hidden.std() < 2
    assert F.cosine_similarity(states[0], states[20], dim=0).abs() < 0.5
