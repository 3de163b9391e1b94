"""Contrast with a twin's keys against loops in numpy; its targets, its gradients, and samples without a modality."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opt.objectives.contrastive import in_batch, momentum_contrast
from opt.objectives.term import Term

COUNT = torch.tensor(3.0)


def inputs(samples: int = 6, ring: int = 9, width: int = 5) -> dict[str, Tensor]:
    """Samples of which some lack a modality, and a ring with empty rows and one more caption of a picture."""
    torch.manual_seed(1)
    first, second, kept_first, kept_second = (F.normalize(torch.randn(samples, width), dim=-1) for _ in range(4))
    old_first, old_second = (F.normalize(torch.randn(ring, width), dim=-1) for _ in range(2))
    has_first, has_second = torch.rand(samples + ring) < 0.8, torch.rand(samples + ring) < 0.8
    has_first[:3] = has_second[:3] = True
    has_first[3:4] = has_second[4:5] = False
    has_first[samples : samples + 1] = True
    has_second[samples : samples + 1] = False  # a picture of the batch, without its speech or text
    picture = torch.tensor([5, 6, 5, 7, 8, 9])[:samples]
    old_picture = torch.tensor([6, 11, 12, -1, -1, 13, 14, 6, 15])[:ring]
    return {
        "first_BE": first.requires_grad_(), "second_BE": second.requires_grad_(), "kept_first_BE": kept_first,
        "kept_second_BE": kept_second, "keys_first_CE": torch.cat([kept_first, old_first]),
        "keys_second_CE": torch.cat([kept_second, old_second]),
        "both_B": has_first[:samples] & has_second[:samples], "has_first_C": has_first, "has_second_C": has_second,
        "picture_B": picture, "picture_C": torch.cat([picture, old_picture]),
        "scale": torch.tensor([4.0], requires_grad=True),
    }


def by_hand(given: dict[str, Tensor], alpha: float) -> float:
    """The sum over samples and directions, a sample at a time in float64."""
    made = {name: value.detach().double().numpy() for name, value in given.items()}
    total = 0.0
    for query, kept, keys, has in (("first_BE", "kept_first_BE", "keys_second_CE", "has_second_C"),
                                   ("second_BE", "kept_second_BE", "keys_first_CE", "has_first_C")):
        kept_keys = made[keys][made[has] == 1]
        pictures = made["picture_C"][made[has] == 1]
        for row in np.flatnonzero(made["both_B"]):
            chance, belief = (np.exp(made["scale"] * kept_keys @ vector) for vector in (made[query][row],
                                                                                      made[kept][row]))
            own = pictures == made["picture_B"][row]
            target = (1 - alpha) * own / own.sum() + alpha * belief / belief.sum()
            total -= (target * np.log(chance / chance.sum())).sum()
    return total / 2


def contrast(given: dict[str, Tensor], alpha: float | Tensor = 0.4) -> Term:
    return momentum_contrast(**given, alpha=alpha, count=COUNT, weight=0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_by_hand(alpha: float) -> None:
    given = inputs()
    term = contrast(given, alpha)
    assert term.total.item() == pytest.approx(by_hand(given, alpha), rel=1e-5)
    assert contrast(given, torch.tensor(alpha)).total.item() == pytest.approx(term.total.item(), rel=1e-6)
    assert term.count is COUNT and term.weight == 0.5


def test_without_distillation_it_is_cross_entropy_whatever_the_twin_believes() -> None:
    given = inputs(ring=1)
    given["picture_B"], given["picture_C"] = torch.arange(6), torch.arange(7)
    both, own = given["both_B"], torch.arange(6)
    hard = 0.0
    for query, keys, has in (("first_BE", "keys_second_CE", "has_second_C"), ("second_BE", "keys_first_CE",
                                                                              "has_first_C")):
        logits = (given["scale"] * given[query] @ given[keys].T).masked_fill(~given[has], float("-inf"))
        hard += F.cross_entropy(logits[both], own[both], reduction="sum") / 2
    term = contrast(given, 0.0)
    torch.testing.assert_close(term.total, hard)
    given["kept_first_BE"] = -given["kept_first_BE"]
    assert torch.equal(contrast(given, 0.0).total, term.total)


def test_the_gradient_is_that_of_the_queries_alone_and_finite() -> None:
    given = inputs()
    for name in ("kept_first_BE", "kept_second_BE", "keys_first_CE", "keys_second_CE"):
        given[name].requires_grad_()
    contrast(given).total.backward()
    for name in ("kept_first_BE", "kept_second_BE", "keys_first_CE", "keys_second_CE"):
        assert given[name].grad is None, name
    both = given["both_B"]
    assert 0 < both.sum() < len(both)
    for name in ("first_BE", "second_BE"):
        assert torch.isfinite(given[name].grad).all() and not given[name].grad[~both].any()
        assert given[name].grad[both].abs().sum(1).min() > 1e-4
    assert torch.isfinite(given["scale"].grad).all() and given["scale"].grad.abs() > 0


def test_the_gradient_by_differences() -> None:
    given = inputs()
    kept = given["kept_first_BE"]

    def of(first: Tensor, second: Tensor) -> Tensor:
        return contrast(given | {"first_BE": first, "second_BE": second}).total

    contrast(given).total.backward()
    for name in ("first_BE", "second_BE"):
        step = torch.randn(kept.shape)
        moved = [of(**{"first": given["first_BE"], "second": given["second_BE"], name[:-3]: given[name] + way * step})
                 for way in (1e-2, -1e-2)]
        assert ((moved[0] - moved[1]) / 2e-2).item() == pytest.approx((given[name].grad * step).sum().item(), rel=1e-3)
    higher, lower = (by_hand(given | {"scale": given["scale"] + way}, 0.0) for way in (1e-3, -1e-3))
    given["scale"].grad = None
    contrast(given, 0.0).total.backward()
    assert given["scale"].grad.item() == pytest.approx((higher - lower) / 2e-3, rel=1e-3)


def test_the_twins_beliefs_teach_the_temperature_nothing() -> None:
    """At the twin's own vectors cross entropy and entropy differ only in what is let through."""
    given = inputs()
    given["first_BE"], given["second_BE"] = given["kept_first_BE"].clone(), given["kept_second_BE"].clone()
    contrast(given, 1.0).total.backward()
    assert given["scale"].grad.abs() < 1e-5, "the likeliest is what is believed: no slope"


def test_what_a_sample_without_a_modality_holds_changes_nothing() -> None:
    given = inputs()
    wanted = contrast(given).total
    absent = ~given["both_B"]
    changed = dict(given)
    for name in ("first_BE", "second_BE", "kept_first_BE", "kept_second_BE"):
        changed[name] = given[name].detach().masked_fill(absent[:, None], float("nan")).requires_grad_()
    for name, has in (("keys_first_CE", "has_first_C"), ("keys_second_CE", "has_second_C")):
        changed[name] = given[name].masked_fill(~given[has][:, None], 1e4)
    found = contrast(changed).total
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert torch.isfinite(changed["first_BE"].grad).all() and torch.isfinite(given["scale"].grad).all()


def test_the_order_of_keys_and_of_samples_is_none() -> None:
    given = inputs()
    rows, keys = torch.randperm(6), torch.randperm(15)
    turned = {name: value[rows if "_B" in name else keys] if name != "scale" else value
              for name, value in given.items()}
    torch.testing.assert_close(contrast(turned).total, contrast(given).total)


@pytest.mark.parametrize("samples", [0, 3])
def test_samples_of_one_modality_give_zero_and_a_gradient_path(samples: int) -> None:
    given = inputs(samples, 0 if samples == 0 else 9)
    given["both_B"], given["has_second_C"] = given["both_B"] & False, given["has_second_C"] & False
    term = contrast(given)
    assert term.total.item() == 0.0
    term.total.backward()
    assert torch.isfinite(given["first_BE"].grad).all()


def test_in_half_precision_the_logits_are_whole() -> None:
    given = inputs()
    given["scale"] = torch.tensor([100.0])
    with torch.autocast("cpu", torch.bfloat16):
        total = contrast(given).total
    assert total.dtype == torch.float32 and total.item() == pytest.approx(by_hand(given, 0.4), rel=1e-4)


def test_with_a_twin_that_is_the_model_and_no_ring_it_is_the_contrast_in_the_batch() -> None:
    torch.manual_seed(2)
    first, second = (F.normalize(torch.randn(5, 4), dim=-1) for _ in range(2))
    there, picture, scale = torch.ones(5, dtype=torch.bool), torch.arange(5), torch.tensor([7.0])
    found = momentum_contrast(first, second, first, second, first, second, there, there, there, picture, picture,
                              scale, 0.0, COUNT)
    torch.testing.assert_close(found.total, in_batch(first, second, picture, scale, COUNT, 5).total)
