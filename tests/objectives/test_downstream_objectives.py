"""The objectives of fine-tuning against values computed by hand."""

import math

import pytest
import torch

from opt.objectives.matching import margin_ranking, soft_classes


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_margin_ranking_by_hand() -> None:
    true, false = [2.0, -1.0], [[0.0, 1.9], [-4.0, 3.0]]
    wanted = sum(max(0.0, 0.2 + sigmoid(other) - sigmoid(own))
                 for own, others in zip(true, false, strict=True) for other in others)
    term = margin_ranking(torch.tensor(true), torch.tensor(false), torch.tensor(4.0), 0.2)
    assert term.total.item() == pytest.approx(wanted, abs=1e-6)
    assert term.mean().item() == pytest.approx(wanted / 4, abs=1e-6)


def test_margin_ranking_is_nothing_beyond_the_margin_and_the_margin_where_nothing_is_told_apart() -> None:
    count = torch.tensor(2.0)
    assert margin_ranking(torch.tensor([5.0]), torch.tensor([[-5.0, -3.0]]), count).total.item() == 0.0
    assert margin_ranking(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), count).mean().item() == pytest.approx(0.2)
    true = torch.tensor([0.0], requires_grad=True)
    margin_ranking(true, torch.tensor([[0.5, -9.0]]), count).total.backward()
    assert true.grad is not None and true.grad.item() == pytest.approx(-0.25), "one of the two is within the margin"


def test_soft_classes_by_hand() -> None:
    logits, target = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.6, 0.0, 1.0]])
    wanted = -sum(t * math.log(sigmoid(z)) + (1 - t) * math.log(1 - sigmoid(z))
                  for z, t in zip(logits[0].tolist(), target[0].tolist(), strict=True))
    term = soft_classes(logits, target, torch.tensor(1.0))
    assert term.total.item() == pytest.approx(wanted, abs=1e-5)


def test_no_rows_give_zero_with_a_gradient() -> None:
    logits = torch.zeros((0, 3), requires_grad=True)
    for term in (soft_classes(logits, torch.zeros((0, 3)), torch.tensor(0.0)),
                 margin_ranking(logits[:, 0], logits[:, 1:], torch.tensor(0.0))):
        assert term.mean().item() == 0.0
        term.total.backward()
    assert logits.grad is not None
