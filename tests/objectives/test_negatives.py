"""Hard negatives: never a right one, by the softmax of the scores, and the same for the same keys in any company."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from opt.data.plan import _mix, row_keys
from opt.objectives.matching import _mixed, draw_negatives


def keys(number: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(row_keys(seed, 0, np.arange(number)).view(np.int64))


def table(queries: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Scores with samples of six pictures."""
    torch.manual_seed(0)
    picture = torch.arange(max(queries, candidates)) % 6
    return 3 * torch.randn(queries, candidates), picture[:queries, None] != picture[:candidates]


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_they_are_drawn_by_the_softmax_of_wrong_ones(spread: float) -> None:
    scores = spread * torch.tensor([[0.3, 9.0, 1.0, -0.5, 0.0, -1.2]])
    wrong = torch.tensor([[True, False, True, True, True, True]])
    draws = 40_000
    index, possible = draw_negatives(scores.expand(draws, 6), wrong.expand(draws, 6), keys(draws), keys(6, 1))
    seen = torch.bincount(index, minlength=6)
    chances = scores.double().masked_fill(~wrong, float("-inf")).softmax(1)[0]
    assert possible.all() and seen[1] == 0
    likely = chances * draws > 5
    assert stats.chisquare(seen[likely], chances[likely] * seen[likely].sum() / chances[likely].sum()).pvalue > 1e-3


def test_plain_numbers_as_keys_draw_by_chance_too() -> None:
    draws = 20_000
    index, _ = draw_negatives(torch.zeros(draws, 8), torch.ones(draws, 8, dtype=torch.bool), torch.arange(draws),
                              torch.arange(8))
    assert stats.chisquare(torch.bincount(index, minlength=8)).pvalue > 1e-3
    pairs = torch.bincount(index[:-1] * 8 + index[1:], minlength=64)
    assert stats.chisquare(pairs).pvalue > 1e-3, "neighbours know nothing of each other"


def test_a_wrong_one_however_unlikely_and_none_where_all_are_right() -> None:
    """Where a softmax would be all zeros beside the right one, and rows of one picture (ALBEF's crash)."""
    scores, wrong = torch.tensor([[1e4, -1e4, -2e4]] * 3), torch.tensor([[False, True, True], [False, False, True],
                                                                         [False, False, False]])
    index, possible = draw_negatives(scores, wrong, keys(3), keys(3, 1))
    assert index.tolist() == [1, 2, 0] and possible.tolist() == [True, True, False]
    index, possible = draw_negatives(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool), keys(0), keys(0))
    assert index.shape == possible.shape == (0,) and index.dtype == torch.int64
    assert draw_negatives(torch.zeros(0, 4), torch.ones(0, 4, dtype=torch.bool), keys(0), keys(4))[0].shape == (0,)


def test_ever_wrong_and_ever_the_same() -> None:
    scores, wrong = table(300, 300)
    first, second = (draw_negatives(scores, wrong, keys(300), keys(300)) for _ in range(2))
    assert first[1].all() and wrong[torch.arange(300), first[0]].all()
    torch.manual_seed(99)
    assert torch.equal(first[0], second[0])


def test_ranks_and_order_change_nothing() -> None:
    """Queries of one rank by themselves, and candidates gathered in another order."""
    scores, wrong = table(60, 80)
    key_B, key_C = keys(60), keys(80, 1)
    whole, _ = draw_negatives(scores, wrong, key_B, key_C)
    rows, columns = torch.arange(1, 60, 2), torch.randperm(80)
    part, _ = draw_negatives(scores[rows][:, columns], wrong[rows][:, columns], key_B[rows], key_C[columns])
    assert torch.equal(columns[part], whole[rows])


def test_other_salts_and_other_directions_draw_apart() -> None:
    number = 4000
    scores, wrong = torch.zeros(number, 16), torch.ones(number, 16, dtype=torch.bool)
    key_B, key_C = keys(number), keys(16, 1)
    draws = [draw_negatives(scores, wrong, key_B, key_C, salt)[0] for salt in (0, 1, 2)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert stats.chi2_contingency(np.histogram2d(draws[one], draws[other], 16)[0]).pvalue > 1e-3
    square = torch.zeros(number // 10, number // 10), torch.ones(number // 10, number // 10, dtype=torch.bool)
    forward, _ = draw_negatives(*square, key_B[:400], key_B[:400])
    same = (draw_negatives(square[0].T, square[1].T, key_B[:400], key_B[:400], 1)[0] == forward).float().mean()
    assert same < 0.02, "texts of pictures are not drawn as pictures of texts"


def test_scores_keep_no_gradient() -> None:
    scores = torch.zeros(2, 2, requires_grad=True)
    assert not draw_negatives(scores, torch.ones(2, 2, dtype=torch.bool), keys(2), keys(2))[0].requires_grad


def test_the_noise_is_mixed_as_the_plan_mixes() -> None:
    numbers = np.array([0, 1, 2**63, 2**64 - 1, 123456789123456789], np.uint64)
    assert np.array_equal(_mixed(torch.from_numpy(numbers.view(np.int64))).numpy().view(np.uint64), _mix(numbers))
