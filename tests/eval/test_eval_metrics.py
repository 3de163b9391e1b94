"""Metrics against independent references: scikit-learn, the normal interval."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from eval import metrics


def test_average_precision_equals_scikit_learn_with_ties_and_weights():
    random = np.random.default_rng(2)
    scores, labels = random.integers(0, 5, (60, 4)).astype(float), random.random((60, 4)) < 0.3
    labels[:, 3] = False
    weights = random.integers(0, 3, (5, 60))
    plain, weighted = metrics.average_precision(scores, labels), metrics.average_precision(scores, labels, weights)
    for number in range(3):
        truth = average_precision_score(labels[:, number], scores[:, number])
        assert plain[number] == pytest.approx(truth)
        for row in range(5):
            truth = average_precision_score(labels[:, number], scores[:, number], sample_weight=weights[row])
            assert weighted[row, number] == pytest.approx(truth)
    assert np.isnan(plain[3]) and np.isnan(weighted[:, 3]).all()
    assert metrics.mean_average_precision(scores, labels) == pytest.approx(plain[:3].mean())


def test_bootstrap_of_a_share_is_near_the_normal_interval_and_seeded():
    values = (np.arange(400) % 4 == 0).astype(float)
    low, high = metrics.bootstrap(values, seed=3)
    assert low == pytest.approx(0.25 - 1.96 * np.sqrt(0.25 * 0.75 / 400), abs=0.01)
    assert high == pytest.approx(0.25 + 1.96 * np.sqrt(0.25 * 0.75 / 400), abs=0.01)
    assert metrics.bootstrap(values, seed=3) == (low, high)


def test_bootstrap_draws_groups_whole():
    values = np.repeat((np.arange(40) % 2).astype(float), 10)  # 400 values that are only 40 independent ones
    low, high = metrics.bootstrap(values, seed=0, groups=np.repeat(np.arange(40), 10))
    alone = metrics.bootstrap(values[::10], seed=0)
    assert (low, high) == pytest.approx(alone)


def test_resample_counts_keep_groups_together():
    counts = metrics.resample_counts(np.array([0, 0, 1, 2]), seed=0, resamples=50)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, [0, 2, 3]].sum(1) == 3).all()
