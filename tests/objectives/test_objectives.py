"""Objectives against values computed by hand: sums, counts, gradients' direction, empty targets."""

import math

import numpy as np
import pytest
import torch

from opt.objectives.contrastive import in_batch
from opt.objectives.masked import feature_regression, frame_contrast, token_cross_entropy
from opt.objectives.matching import five_way
from opt.objectives.term import Term, loss

ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


def test_token_cross_entropy_sums_minus_log_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    term = token_cross_entropy(logits, torch.tensor([1, 1]), TWO)
    assert term.total.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    assert term.mean().item() == pytest.approx(term.total.item() / 2)


def test_feature_regression_is_the_squared_distance_and_leaves_its_target_alone() -> None:
    predicted = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)
    term = feature_regression(predicted, target, TWO)
    assert term.total.item() == pytest.approx(4 / 2 + 25 / 2)
    term.total.backward()
    assert target.grad is None


def test_frame_contrast_by_hand_counts_only_frames_of_the_same_recording() -> None:
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    predicted = torch.tensor([[2.0, 0.0]])
    term = frame_contrast(predicted, frames, torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 0, 1, 0]), ONE, 0.5)
    similar = np.array([1.0, 0.0, 0.6]) / 0.5  # the third frame is of another recording
    assert term.total.item() == pytest.approx(-math.log(math.exp(similar[0]) / np.exp(similar).sum()), abs=1e-5)


def test_frame_contrast_is_smallest_at_the_perfect_prediction() -> None:
    """The official code trains the opposite (docs/opt.md, defects)."""
    torch.manual_seed(0)
    frames = torch.randn(8, 6)
    own, same = torch.tensor([3]), torch.zeros(1, dtype=torch.long)

    def value(predicted: torch.Tensor) -> float:
        return frame_contrast(predicted[None], frames, own, same, torch.zeros(8, dtype=torch.long), ONE).total.item()

    perfect = value(frames[3])
    assert all(perfect < value(torch.randn(6)) for _ in range(50))
    assert perfect < value(frames[3] + 0.3 * torch.randn(6)) < value(-frames[3])


def test_frame_contrast_has_its_minimum_at_the_perfect_prediction_and_the_gradient_leads_there() -> None:
    """Negatives in opposite pairs pull evenly, so the minimum is exact: no slope there, and every way out is up."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5)).Q
    frames = torch.cat([axes[:1], axes[1:], -axes[1:]])
    own, sample_m, sample_t = torch.tensor([0]), torch.zeros(1, dtype=torch.long), torch.zeros(9, dtype=torch.long)

    def value(predicted: torch.Tensor) -> torch.Tensor:
        return frame_contrast(predicted[None], frames, own, sample_m, sample_t, ONE, 1.0).total

    perfect = frames[0].clone().requires_grad_()
    value(perfect).backward()
    assert perfect.grad.abs().max() < 1e-5
    assert all(value(perfect.detach()) < value(perfect.detach() + scale * torch.randn(5))
               for scale in (0.1, 0.3, 1.0) for _ in range(100))
    predicted = torch.randn(5)
    for _ in range(200):
        predicted = predicted.detach().requires_grad_()
        value(predicted).backward()
        predicted = predicted - predicted.grad
    assert torch.cosine_similarity(predicted, frames[0], dim=0) > 0.999


def test_the_gradient_of_the_frame_contrast_by_hand() -> None:
    """d loss / d cosine_j = (softmax_j - [j is the hidden frame]) / temperature, times d cosine_j / d prediction."""
    torch.manual_seed(3)
    frames, predicted = torch.randn(7, 6).double(), torch.randn(6).double()
    given = predicted.float().requires_grad_()
    where = torch.tensor([2])
    frame_contrast(given[None], frames.float(), where, torch.zeros(1), torch.zeros(7), ONE, 0.2).total.backward()
    length, unit = predicted.norm(), predicted / predicted.norm()
    others = frames / frames.norm(dim=1, keepdim=True)
    cosine = others @ unit
    slope = torch.softmax(cosine / 0.2, 0)
    slope[2] -= 1
    wanted = (slope[:, None] / 0.2 * (others - cosine[:, None] * unit) / length).sum(0)
    torch.testing.assert_close(given.grad.double(), wanted, atol=1e-5, rtol=1e-4)


def test_smoothing_spreads_its_share_evenly() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    losses = -torch.log_softmax(logits, -1)[0]
    term = token_cross_entropy(logits, torch.tensor([1]), ONE, smoothing=0.1)
    assert term.total.item() == pytest.approx((0.9 * losses[1] + 0.1 * losses.mean()).item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_filler_reach_no_loss(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(4, 7, requires_grad=True), torch.tensor([1, -100, 3, -100])
    term = token_cross_entropy(logits, label, TWO, smoothing)
    real = token_cross_entropy(logits[[0, 2]], label[[0, 2]], TWO, smoothing)
    assert term.total.item() == pytest.approx(real.total.item())
    term.total.backward()
    assert not logits.grad[[1, 3]].any()
    assert token_cross_entropy(logits, label.fill_(-100), TWO, smoothing).mean().item() == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_what_a_twin_believes_is_its_share_of_the_target(alpha: float, smoothing: float) -> None:
    """One cross entropy against the mixture, which no filler reaches; the twin gets no gradient."""
    torch.manual_seed(0)
    logits, soft = torch.randn(5, 7, requires_grad=True), (3 * torch.randn(5, 7)).requires_grad_()
    label = torch.tensor([1, -100, 3, 0, -100])
    hard = torch.nn.functional.one_hot(label.clamp(min=0), 7) * (1 - smoothing) + smoothing / 7
    mixed = (1 - alpha) * hard + alpha * soft.detach().softmax(-1)
    wanted = -(mixed * logits.detach().log_softmax(-1))[label >= 0].sum()
    for share in (alpha, torch.tensor(alpha)):
        term = token_cross_entropy(logits, label, TWO, smoothing, 0.5, soft, share)
        torch.testing.assert_close(term.total, wanted)
    assert term.weight == 0.5
    term.total.backward()
    assert soft.grad is None and not logits.grad[label < 0].any() and logits.grad[label >= 0].any(1).all()
    if alpha == 0:
        assert torch.equal(term.total, token_cross_entropy(logits, label, TWO, smoothing).total)


def test_five_way_matching_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0, 0.5, -3.0]])
    term = five_way(logits, torch.tensor([0]), ONE)
    sigmoid = 1 / (1 + np.exp(-logits[0].numpy()))
    wanted = -math.log(sigmoid[0]) - np.log(1 - sigmoid[1:]).sum()
    assert term.total.item() == pytest.approx(wanted, abs=1e-5)
    softmax = five_way(logits, torch.tensor([0]), ONE, "softmax")
    assert softmax.total.item() == pytest.approx(-torch.log_softmax(logits, -1)[0, 0].item(), abs=1e-5)


def test_in_batch_contrast_by_hand_and_same_pictures_are_no_negatives() -> None:
    first = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=-1)
    second = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, 0.8]]), dim=-1)
    logits = (3.0 * first @ second.T).numpy()
    logits[0, 2] = logits[2, 0] = -np.inf
    wanted = 0.0
    for matrix in (logits, logits.T):
        for row in range(3):
            wanted -= (matrix[row, row] - np.log(np.exp(matrix[row]).sum())) / 2
    term = in_batch(first, second, torch.tensor([5, 6, 5]), torch.tensor([3.0]), torch.tensor(3.0), 3)
    assert term.total.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("term", [
    token_cross_entropy(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long), torch.tensor(0.0)),
    token_cross_entropy(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long), torch.tensor(0.0),
                        soft_MV=torch.zeros(0, 4), alpha=0.4),
    feature_regression(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4), torch.tensor(0.0)),
    frame_contrast(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long),
                   torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.tensor(0.0)),
    five_way(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.long), torch.tensor(0.0)),
    in_batch(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long),
             ONE[None], torch.tensor(0.0), 0),
])
def test_no_targets_give_zero_and_a_gradient_path(term: Term) -> None:
    assert term.mean().item() == 0.0
    term.total.backward()


def test_the_loss_is_the_weighted_sum_of_means_and_splits_add_up() -> None:
    terms = {"a": Term(torch.tensor(6.0), torch.tensor(3.0)), "b": Term(torch.tensor(4.0), TWO, weight=0.5)}
    assert loss(terms).item() == pytest.approx(3.0)
    logits, target, count = torch.randn(10, 7), torch.randint(0, 7, (10,)), torch.tensor(10.0)
    whole = token_cross_entropy(logits, target, count).mean()
    parts = [token_cross_entropy(logits[part], target[part], count).mean() for part in (slice(0, 3), slice(3, 10))]
    assert whole.item() == pytest.approx(float(sum(parts)), abs=1e-6)


def test_a_loss_without_terms_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        loss({})
