"""Ranks against brute force over all orders of ties, and blocks against one matrix."""

import itertools

import numpy as np
import pytest

from eval import ranking


def test_ranks_equal_the_mean_over_all_fair_orders_of_ties():
    random = np.random.default_rng(0)
    scores = random.integers(0, 3, (20, 6)).astype(float)
    positive = random.random((20, 6)) < 0.4
    positive[0] = False
    found = ranking.ranks(scores, positive)
    assert np.isinf(found[0])
    for row in range(1, 20):
        if not positive[row].any():
            continue
        firsts = []
        for order in itertools.permutations(range(6)):
            ranked = sorted(order, key=lambda candidate: -scores[row, candidate])  # stable: `order` decides ties
            firsts.append(1 + next(place for place, candidate in enumerate(ranked) if positive[row, candidate]))
        assert found[row] == pytest.approx(np.mean(firsts))


def test_constant_scores_are_no_better_than_the_middle():
    assert ranking.ranks(np.zeros((1, 200)), np.arange(200)[None] == 7)[0] == 100.5


def test_chance_recall_is_the_hypergeometric_probability():
    assert ranking.chance_recall(np.array([1, 1]), 200, 1) == pytest.approx(0.005)
    assert ranking.chance_recall(np.array([5]), 20, 2) == pytest.approx(1 - 15 / 20 * 14 / 19)
    assert ranking.chance_recall(np.array([1]), 3, 10) == 1.0


def vectors(count, seed, levels=3):
    """Vectors of few values, so that many products are equal."""
    return np.random.default_rng(seed).integers(0, levels, (count, 4)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 70, 10_000])
def test_ranks_of_vectors_in_blocks_equal_brute_force_with_ties(monkeypatch, block):
    monkeypatch.setattr(ranking, "BLOCK", block)
    queries, candidates = vectors(40, 0), vectors(60, 1)
    candidate_group = np.random.default_rng(2).integers(0, 20, 60)
    query_group = np.random.default_rng(3).choice(candidate_group, 40)
    scores, positive = queries @ candidates.T, query_group[:, None] == candidate_group
    found = ranking.rank(queries, candidates, query_group, candidate_group, 7, seed=0)
    np.testing.assert_allclose(found.ranks, ranking.ranks(scores, positive))
    best = -np.sort(-scores, axis=1)[:, :7]
    np.testing.assert_array_equal(np.take_along_axis(scores, found.first, axis=1), best)
    assert all(len(set(row)) == 7 for row in found.first.tolist())


def test_a_query_without_its_candidate_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="needs a candidate"):
        ranking.rank(vectors(2, 0), vectors(3, 1), np.array([0, 9]), np.array([0, 0, 1]), 1, seed=0)


def test_equals_at_the_cut_come_in_no_particular_order():
    same = np.ones((50, 2), np.float32)
    first = [ranking.rank(same[:1], same, np.array([0]), np.arange(50), 5, seed).first[0] for seed in range(8)]
    assert len({tuple(row) for row in first}) == 8


def test_last_bits_do_not_decide():
    queries, candidates = np.array([[1.0, 0.0]], np.float32), np.array([[0.5, 0], [0.5 + 1e-7, 0]], np.float32)
    assert ranking.rank(queries, candidates, np.array([0]), np.array([0, 1]), 1, 0).ranks[0] == 1.5
