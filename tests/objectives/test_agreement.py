"""Agreement of two modalities against loops in numpy, and the filter on known distributions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opt.objectives.agreement import agreement, trusted
from opt.objectives.term import Term

COUNT = torch.tensor(3.0)


def inputs(samples: int = 5, ring: int = 8, width: int = 4) -> dict[str, Tensor]:
    """Samples and keys of which some lack a modality."""
    torch.manual_seed(1)
    first, second = (F.normalize(torch.randn(samples, width), dim=-1).requires_grad_() for _ in range(2))
    keys = [F.normalize(torch.randn(samples + ring, width), dim=-1).requires_grad_() for _ in range(2)]
    both = torch.rand(samples + ring) < 0.7
    both[:3], both[3] = True, False
    return {"first_BE": first, "second_BE": second, "keys_first_CE": keys[0], "keys_second_CE": keys[1],
            "asked_B": both[:samples] & torch.tensor([True, False, True, True, True]), "both_C": both,
            "scale": torch.tensor([3.0], requires_grad=True)}


def term(given: dict[str, Tensor]) -> Term:
    return agreement(**given, count=COUNT, weight=0.5)


def chances(query: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    powers = np.exp(scale * keys @ query)
    return powers / powers.sum()


def test_by_hand() -> None:
    given, total = inputs(), 0.0
    made = {name: value.detach().double().numpy() for name, value in given.items()}
    open_C = made["both_C"] == 1
    for row in np.flatnonzero(made["asked_B"]):
        p = chances(made["first_BE"][row], made["keys_second_CE"][open_C], made["scale"].item())
        q = chances(made["second_BE"][row], made["keys_first_CE"][open_C], made["scale"].item())
        total += 0.5 * ((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
    found = term(given)
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    assert found.count is COUNT and found.weight == 0.5


def test_it_is_none_where_both_agree_and_only_there() -> None:
    given = inputs()
    same = {**given, "second_BE": given["first_BE"], "keys_second_CE": given["keys_first_CE"]}
    assert term(same).total.item() == pytest.approx(0, abs=1e-7) and term(given).total > 0.01


def test_both_sides_and_the_scale_learn_and_keys_do_not() -> None:
    given = inputs()
    term(given).total.backward()
    for name in ("first_BE", "second_BE"):
        reached = given[name].grad.any(dim=1)
        assert torch.equal(reached, given["asked_B"])
    assert given["scale"].grad.any() and given["keys_first_CE"].grad is None


def test_what_is_shut_out_may_hold_anything_and_nothing_asked_is_nothing() -> None:
    given = inputs()
    expected = term(given).total
    with torch.no_grad():
        for name in ("keys_first_CE", "keys_second_CE"):
            given[name][~given["both_C"]] = 1e6
        for name in ("first_BE", "second_BE"):
            given[name][~given["asked_B"]] = -7.0
    assert torch.equal(term(given).total, expected)
    nobody = {**given, "asked_B": given["asked_B"] & False, "both_C": given["both_C"] & False}
    term(nobody).total.backward()
    assert term(nobody).total == 0 and not given["first_BE"].grad.any() and not given["scale"].grad.any()


def test_autocast_changes_nothing() -> None:
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = term(given).total
    assert torch.equal(found, term(given).total)


ALL = torch.ones(20_000, dtype=torch.bool)


@pytest.mark.parametrize(("sides", "deviations", "share"), [
    ("below", 2.0, 0.97725), ("below", 1.0, 0.84134), ("both", 2.0, 0.9545), ("none", 0.0, 1.0), ("below", 0.0, 0.5)])
def test_so_many_are_trusted_on_a_normal_distribution(sides: str, deviations: float, share: float) -> None:
    torch.manual_seed(0)
    new, earlier = (0.4 + 0.1 * torch.randn(20_000) for _ in range(2))
    found = trusted(new, ALL, earlier, ALL, deviations, sides)
    assert found.float().mean().item() == pytest.approx(share, abs=0.01)
    if sides == "below" and deviations:
        assert new[~found].max() < 0.4 - 0.09 * deviations, "only the least alike"


def test_by_hand_it_is_mean_and_deviation_of_earlier_pairs_alone() -> None:
    earlier, both = torch.tensor([0.5, 0.7, 9.0, 0.6, 0.8]), torch.tensor([True, True, False, True, True])
    mean, deviation = 0.65, np.std([0.5, 0.7, 0.6, 0.8], ddof=1)
    edge = mean - 1.5 * deviation
    new = torch.tensor([edge - 1e-3, edge + 1e-3, -5.0, 2.0])
    pair = torch.tensor([True, True, False, True])
    assert trusted(new, pair, earlier, both, 1.5).tolist() == [False, True, False, True]
    assert trusted(new, pair, earlier, both, 1.5, "both").tolist() == [False, True, False, False]
    assert trusted(new, pair, earlier, both, float("inf")).tolist() == pair.tolist()


@pytest.mark.parametrize("known", [0, 1])
def test_too_few_earlier_pairs_say_nothing(known: int) -> None:
    new, pair = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([True, False, True])
    both = torch.arange(5) < known
    for sides in ("below", "both"):
        assert torch.equal(trusted(new, pair, torch.full((5,), 0.9), both, 2.0, sides), pair)


def test_never_are_all_left_out() -> None:
    earlier = torch.tensor([0.7, 0.8, 0.9])
    new, pair = torch.tensor([-0.5, -0.4, 0.8]), torch.tensor([True, True, False])
    assert torch.equal(trusted(new, pair, earlier, ALL[:3], 2.0), pair)
    assert trusted(new, ALL[:3], earlier, ALL[:3], 2.0).tolist() == [False, False, True]
