"""Corruption: rates within binomial bounds, 80/10/10, never everything, a pure function of the row's key."""

import numpy as np
import pytest

from opt.data import corrupt

DRAWS = 100_000
MASK, ORDINARY = 4, np.arange(10, 110)


def within(share: float, wanted: float, draws: int = DRAWS) -> bool:
    """Within five standard deviations of a binomial share."""
    return abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / draws)


def test_words_are_masked_replaced_and_kept_at_80_10_10() -> None:
    ids = np.full(DRAWS, 10)
    changed = corrupt.words(ids, MASK, ORDINARY, corrupt.row_generator(1))
    kept_by_chance = 0.1 / len(ORDINARY)
    assert within((changed == MASK).mean(), 0.8)
    assert within((changed == 10).mean(), 0.1 + kept_by_chance)
    assert set(np.unique(changed)) <= {MASK, *ORDINARY.tolist()}, "never a special token but the mask"


def test_positions_are_hidden_at_their_rate_and_at_least_one() -> None:
    rng = corrupt.row_generator(2)
    drawn = [corrupt.positions(40, 0.15, rng) for _ in range(DRAWS)]
    at_least_one = (1 - 0.15) ** 40 / 40  # what forcing one adds
    assert within(sum(map(len, drawn)) / DRAWS / 40, 0.15 + at_least_one, 40 * DRAWS)
    assert min(map(len, drawn)) >= 1
    assert all(len(corrupt.positions(3, 0.0, rng)) == 1 for _ in range(100))
    with pytest.raises(ValueError, match="empty"):
        corrupt.positions(0, 0.15, rng)


def test_all_pieces_of_a_word_are_hidden_together_at_the_rate_of_words() -> None:
    rng, word = corrupt.row_generator(5), np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9])
    hidden = np.zeros((DRAWS // 10, len(word)), bool)
    for row in hidden:
        where = corrupt.whole_words(word, 0.3, rng)
        assert np.array_equal(where, np.sort(where)) and len(where)
        row[where] = True
    assert all((hidden[:, word == number].all(1) == hidden[:, word == number].any(1)).all() for number in range(10))
    forced = (1 - 0.3) ** 10 / 10
    assert within(hidden[:, 0].mean(), 0.3 + forced, len(hidden)) and within(hidden[:, 3].mean(), 0.3 + forced,
                                                                             len(hidden))
    with pytest.raises(ValueError, match="empty"):
        corrupt.whole_words(np.zeros(0, np.int64), 0.3, rng)


def test_whole_modalities_are_hidden_independently_and_never_all() -> None:
    rng = corrupt.row_generator(3)
    present = np.array([True, True, True])
    drawn = np.array([corrupt.modalities(present, 0.3, rng) for _ in range(DRAWS)])
    assert not drawn.all(axis=1).any()
    given_not_all = (0.3 - 0.3**3) / (1 - 0.3**3)
    assert all(within(share, given_not_all, len(drawn)) for share in drawn.mean(axis=0))
    two = np.array([corrupt.modalities(np.array([True, False, True]), 0.5, rng) for _ in range(200)])
    assert not two[:, 1].any() and not two[:, [0, 2]].all(axis=1).any()


def test_a_key_decides_everything() -> None:
    again = [corrupt.positions(30, 0.3, corrupt.row_generator(77)).tolist() for _ in range(2)]
    assert again[0] == again[1] != corrupt.positions(30, 0.3, corrupt.row_generator(78)).tolist()


@pytest.mark.parametrize("span", [2, 10])
def test_spans_hide_runs_at_the_same_rate_everywhere(span: int) -> None:
    rng, length = corrupt.row_generator(4), 50
    hidden = np.zeros((DRAWS // 2, length), bool)
    for row in hidden:
        row[corrupt.positions(length, 0.15, rng, span)] = True
    none = (1 - 0.15) ** ((length + span - 1) / span)  # then one position is forced
    assert abs(hidden.mean() - 0.15 - none / length) < 6 * np.sqrt(0.15 * 0.85 * span / hidden.size)
    assert abs(hidden[:, 0].mean() - hidden[:, length // 2].mean()) < 6 * np.sqrt(2 * 0.15 * 0.85 / len(hidden))
    inner = hidden[hidden.sum(1) > 1][:, span:-span]
    begins = inner[:, 1:-span] & ~inner[:, : -span - 1]
    rows, places = np.nonzero(begins)
    assert all(inner[row, place + 1 : place + 1 + span].all() for row, place in zip(rows, places, strict=True))


@pytest.mark.parametrize(("grid", "rate"), [(1, 1.0), (2, 0.5), (8, 0.4), (8, 0.02), (14, 0.4), (24, 0.4), (9, 1.0),
                                            (14, 0.0)])
def test_blocks_hide_exactly_their_rate(grid: int, rate: float) -> None:
    rng = corrupt.row_generator(6)
    for _ in range(200):
        hidden = corrupt.blocks(grid, rate, rng)
        assert len(hidden) == round(rate * grid**2)
        assert np.array_equal(hidden, np.unique(hidden)) and hidden.dtype == np.int64
        assert len(hidden) == 0 or 0 <= hidden[0] <= hidden[-1] < grid**2


def test_blocks_are_rectangles_of_many_shapes_anywhere() -> None:
    rng, shown, beside, widths = corrupt.row_generator(7), np.zeros((14, 14)), [], []
    for _ in range(2000):
        hidden = np.zeros((14, 14), bool)
        hidden.flat[corrupt.blocks(14, 0.4, rng)] = True
        shown += hidden
        beside.append((hidden[1:] & hidden[:-1]).sum() / hidden[1:].sum())
        trimmed = np.zeros((14, 14), bool)
        trimmed.flat[corrupt.blocks(14, 12 / 196, rng)] = True  # less than the smallest rectangle: of one, its first
        high, wide = trimmed.any(axis=1).sum(), trimmed.any(axis=0).sum()
        widths.append(wide)
        assert high == -(-12 // wide)
    assert np.mean(beside) > 0.75, "it were 0.4 of independent patches"
    assert shown.min() > 0.03 * 2000, "corners too"
    assert set(widths) == set(range(2, 8)) and abs(np.log(np.array(widths) / 4).mean()) < 0.05


def test_a_rate_of_blocks_beyond_all_is_wrong() -> None:
    with pytest.raises(ValueError, match="1.5 is not within 0 and 1"):
        corrupt.blocks(8, 1.5, corrupt.row_generator(8))
