"""The transport plan against the best assignment and linear programming; padding, gradients, the sign of pairs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from opt.objectives.alignment import transport_plan, word_patch, word_patch_distance


def every(pairs: int, entries: int) -> Tensor:
    return torch.ones(pairs, entries, dtype=torch.bool)


def costs(pairs: int, words: int, patches: int) -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.rand(pairs, words, patches)


def cheapest(cost: np.ndarray) -> float:
    """The exact optimum by linear programming."""
    words, patches = cost.shape
    rows = np.kron(np.eye(words), np.ones(patches))
    columns = np.kron(np.ones(words), np.eye(patches))
    taken = np.concatenate([np.full(words, 1 / words), np.full(patches, 1 / patches)])
    return linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=taken).fun


@pytest.mark.parametrize(("words", "patches"), [(1, 1), (1, 5), (4, 4), (3, 7), (9, 5)])
def test_words_give_and_patches_take_evenly(words: int, patches: int) -> None:
    plan = transport_plan(costs(6, words, patches), every(6, words), every(6, patches))
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), torch.full((6, words), 1 / words))  # what is scaled last
    torch.testing.assert_close(plan.sum(1), torch.full((6, patches), 1 / patches), atol=0.01, rtol=0)


def test_of_as_many_words_as_patches_it_is_the_best_assignment() -> None:
    cost = costs(8, 5, 5)
    plan = transport_plan(cost, every(8, 5), every(8, 5), iterations=1000)
    for one, found in zip(cost.numpy(), plan.numpy(), strict=True):
        rows, columns = linear_sum_assignment(one)
        wanted = np.zeros((5, 5))
        wanted[rows, columns] = 1 / 5
        np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize(("words", "patches"), [(4, 4), (3, 7), (9, 5)])
def test_it_costs_as_little_as_the_cheapest(words: int, patches: int) -> None:
    """Within 2 % after the 50 iterations of the paper, and no more beyond rounding after many."""
    cost = costs(6, words, patches)
    for iterations, above in ((50, 0.02), (2000, 1e-3)):
        plan = transport_plan(cost, every(6, words), every(6, patches), iterations=iterations)
        for one, found in zip(cost.numpy(), (cost * plan).sum((1, 2)).tolist(), strict=True):
            assert found == pytest.approx(cheapest(one), rel=above, abs=above / 10)


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 50), (1.0, 3), (0.2, 7)])
def test_it_is_the_published_iteration(beta: float, iterations: int) -> None:
    """UNITER's order of scalings, a pair at a time; what a cost is where nothing is valid does not matter."""
    cost, text_valid, patch_valid = costs(2, 4, 6), every(2, 4), every(2, 6)
    text_valid[1, 1], patch_valid[1, 4:] = False, False
    cost[~(text_valid[:, :, None] & patch_valid[:, None])] = float("nan")
    found = transport_plan(cost, text_valid, patch_valid, beta, iterations)
    for row in range(2):
        inside = text_valid[row][:, None] & patch_valid[row]
        kernel = np.exp(-cost[row][inside].double().numpy().reshape(int(text_valid[row].sum()), -1) / beta)
        plan, word = np.ones_like(kernel), np.full(len(kernel), 1 / len(kernel))
        for _ in range(iterations):
            step = kernel * plan
            patch = 1 / (kernel.shape[1] * (word @ step))
            word = 1 / (kernel.shape[0] * (step @ patch))
            plan = word[:, None] * step * patch
        np.testing.assert_allclose(found[row][inside], plan.ravel(), atol=1e-5)
        assert not found[row][~inside].any()


def pair(words: int, patches: int, width: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, words, width), torch.randn(2, patches, width)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    text, patch = pair(4, 6)
    text_valid, patch_valid = every(2, 4), every(2, 6)
    text_valid[1, 2:], patch_valid[1, [0, 3]] = False, False
    alone = [word_patch_distance(text[:1], patch[:1], every(1, 4), every(1, 6)),
             word_patch_distance(text[1:, :2], patch[1:, [1, 2, 4, 5]], every(1, 2), every(1, 4))]
    for value in (0.0, 7.0, float("nan")):
        filled = (text.masked_fill(~text_valid[..., None], value), patch.masked_fill(~patch_valid[..., None], value))
        for tensor in filled:
            tensor.requires_grad_()
        found = word_patch_distance(*filled, text_valid, patch_valid)
        torch.testing.assert_close(found, torch.cat(alone))
        found.sum().backward()
        for tensor, valid in zip(filled, (text_valid, patch_valid), strict=True):
            assert torch.isfinite(tensor.grad).all() and not tensor.grad[~valid].any()
            assert tensor.grad[valid].any(1).all()


def test_a_pair_of_nothing_is_no_way_apart() -> None:
    text, patch = pair(4, 6)
    text.requires_grad_()
    text_valid, patch_valid = every(2, 4), every(2, 6)
    text_valid[0], patch_valid[1] = False, False
    found = word_patch_distance(text, patch, text_valid, patch_valid)
    assert found.tolist() == [0, 0]
    found.sum().backward()
    assert not text.grad.any()
    assert word_patch_distance(text[:0], patch[:0], every(0, 4), every(0, 6)).shape == (0,)


def test_the_distance_is_of_directions_from_nothing_to_two() -> None:
    text, _ = pair(5, 5)
    assert word_patch_distance(text, 3 * text.flip(1), every(2, 5), every(2, 5)).abs().max() < 0.01
    one = text[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(word_patch_distance(one, -one, every(2, 5), every(2, 5)), torch.full((2,), 2.0))


def test_no_gradient_goes_through_the_plan_and_half_precision_ends_at_it() -> None:
    text, patch = pair(3, 4)
    text.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = word_patch_distance(text, patch, every(2, 3), every(2, 4))
    assert found.dtype == torch.float32
    found.sum().backward()
    gradient, text.grad = text.grad, None
    cost = 1 - torch.cosine_similarity(text[:, :, None], patch[:, None], dim=-1)
    (cost * transport_plan(cost.detach(), every(2, 3), every(2, 4))).sum().backward()
    torch.testing.assert_close(gradient, text.grad)


def test_own_pairs_come_near_and_others_go_away() -> None:
    distance = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    term = word_patch(distance, torch.tensor([True, False, True]), torch.tensor(3.0))
    assert term.total.item() == 1.25 and term.mean().item() == pytest.approx(1.25 / 3) and term.weight == 0.1
    term.total.backward()
    assert distance.grad.tolist() == [1, -1, 1]
    nothing = word_patch(distance[:0], torch.zeros(0, dtype=torch.bool), torch.tensor(0.0))
    assert nothing.mean().item() == 0.0
