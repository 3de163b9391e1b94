"""Average precision, macro and micro, against scikit-learn: with ties, weights and verified labels."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from eval import metrics


@pytest.fixture
def given():
    random = np.random.default_rng(5)
    scores, labels = random.integers(0, 6, (50, 5)).astype(float), random.random((50, 5)) < 0.25
    labels[:, 4] = False
    return scores, labels, random.random((50, 5)) < 0.6, random.integers(0, 3, (7, 50))


def test_micro_and_macro_equal_scikit_learn(given):
    scores, labels, _, weights = given
    assert metrics.micro_average_precision(scores, labels) == pytest.approx(
        average_precision_score(labels, scores, average="micro"), abs=1e-12)
    assert metrics.mean_average_precision(scores, labels) == pytest.approx(
        average_precision_score(labels[:, :4], scores[:, :4], average="macro"), abs=1e-12)
    by_row = [average_precision_score(labels, scores, average="micro", sample_weight=row) for row in weights]
    np.testing.assert_allclose(metrics.micro_average_precision(scores, labels, weights), by_row, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_resamples_without_a_positive_are_nan_without_a_word(given):
    scores, labels, _, weights = given
    weights[3] = ~labels.any(1)
    found = metrics.mean_average_precision(scores, labels, weights)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3]


def test_labels_that_nobody_verified_do_not_count(given):
    scores, labels, verified, weights = given
    by_class = [average_precision_score(labels[kept, c], scores[kept, c]) for c, kept in enumerate(verified.T[:4])]
    found = metrics.average_precision(scores, labels, verified_NC=verified)
    np.testing.assert_allclose(found[:4], by_class, atol=1e-12)
    assert np.isnan(found[4])
    assert metrics.mean_average_precision(scores, labels, None, verified) == pytest.approx(np.mean(by_class))
    assert metrics.micro_average_precision(scores, labels, None, verified) == pytest.approx(
        average_precision_score(labels[verified], scores[verified]), abs=1e-12)
    spread = np.broadcast_to(weights[:, :, None], (7, 50, 5))
    by_row = [average_precision_score(labels[verified], scores[verified], sample_weight=row[verified])
              for row in spread]  # fmt: skip
    np.testing.assert_allclose(metrics.micro_average_precision(scores, labels, weights, verified), by_row, atol=1e-12)
    by_row = [np.mean([average_precision_score(labels[kept, c], scores[kept, c], sample_weight=row[kept])
                       for c, kept in enumerate(verified.T[:4])]) for row in weights]  # fmt: skip
    np.testing.assert_allclose(metrics.mean_average_precision(scores, labels, weights, verified), by_row, atol=1e-12)


def test_resamples_in_pieces_are_the_same(given, monkeypatch):
    scores, labels, verified, _ = given
    weights = np.random.default_rng(0).integers(0, 3, (40, 50))
    one = np.concatenate([metrics.micro_average_precision(scores, labels, row[None], verified) for row in weights])
    monkeypatch.setattr(metrics, "TOGETHER", 500)
    np.testing.assert_allclose(metrics.micro_average_precision(scores, labels, weights, verified), one, atol=1e-12)


def test_no_positive_is_no_number():
    none = np.zeros((3, 2), bool)
    assert np.isnan(metrics.micro_average_precision(np.ones((3, 2)), none))
