"""The plan: every property the trainer relies on, over odd sizes and costs, for one corpus and several."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from opt.config import UserError
from opt.data.plan import BatchPlan, Plan, Tasks, row_keys, shared_out, split

SIZES = (700, 203, 100)
TASKS = Tasks(("mlm", "dtr", "match"), (0.25, 0.45, 0.3), ("match",))


def make(
    n: int = 1003, seed: int = 3, budget: int = 2000, multiple: int = 8, tasks: Tasks = TASKS,
    sizes: tuple[int, ...] | None = None, proportions: tuple[float, ...] | None = None,
) -> Plan:
    rng = np.random.default_rng(n)
    costs = rng.integers(10, 120, size=n)
    costs[::97] = 5000  # some alone exceed the budget
    pictures = rng.integers(n // 3 + 1, size=n).astype(np.uint64)
    return Plan(seed, costs, budget, tasks, pictures, multiple, sizes, proportions)


def epoch(plan: Plan, number: int = 0) -> list[BatchPlan]:
    start = number * plan.samples_per_epoch
    batches = []
    for batch in plan.batches(start):
        if batch.position >= start + plan.samples_per_epoch:
            return batches
        batches.append(batch)
    raise AssertionError


def same(first: BatchPlan, second: BatchPlan) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.parametrize(("n", "multiple", "budget"), [(1003, 8, 2000), (8, 8, 1), (17, 1, 500), (4100, 6, 10**9)])
def test_samples_come_equally_often(n: int, multiple: int, budget: int) -> None:
    plan = make(n, multiple=multiple, budget=budget)
    times = np.zeros(n, int)
    for number in range(3):
        batches = epoch(plan, number)
        assert sum(map(len, batches)) == plan.samples_per_epoch == n // multiple * multiple
        assert all(batch.epoch == number and len(batch) % multiple == 0 for batch in batches)
        times += np.bincount(np.concatenate([batch.sample for batch in batches]), minlength=n)
        assert times.max() - times.min() <= 1


def test_epochs_differ_in_order() -> None:
    first, second = (np.concatenate([batch.sample for batch in epoch(make(), number)]) for number in (0, 1))
    assert not np.array_equal(first, second)


def test_every_turn_has_its_own_order() -> None:
    plan = make(15)  # 8 rows an epoch: every 15 epochs, 8 turns are over
    begun = [tuple(sorted(np.concatenate([batch.sample for batch in epoch(plan, number)]))) for number in (0, 15, 30)]
    assert len(set(begun)) == 3


@pytest.mark.parametrize("proportions", [(1.0, 1.0, 1.0), (0.1, 7.0, 2.5), (1e-4, 1.0, 1e-4), None])
def test_corpora_come_in_their_proportions_and_their_samples_equally_often(proportions: tuple | None) -> None:
    plan = make(sizes=SIZES, proportions=proportions)
    shares = np.array(proportions or SIZES) / sum(proportions or SIZES)
    bounds = np.cumsum([0, *SIZES])
    times, rows = np.zeros(1003, int), 0
    for number in range(12):
        drawn = np.concatenate([batch.sample for batch in epoch(plan, number)])
        times, rows = times + np.bincount(drawn, minlength=1003), rows + len(drawn)
        corpora = [times[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        assert np.abs(np.array([part.sum() for part in corpora]) - rows * shares).max() <= 1.5
        assert all(part.max() - part.min() <= 1 for part in corpora)


def test_corpora_are_mixed_within_an_epoch() -> None:
    drawn = np.concatenate([batch.sample for batch in epoch(make(sizes=SIZES, proportions=(1, 1, 1)))])
    for part in np.array_split(drawn, 4):
        counts = np.histogram(part, np.cumsum([0, *SIZES]))[0]
        assert (np.abs(counts - len(part) / 3) < 0.1 * len(part)).all()


def test_shared_out_rows_only_grow_and_stay_near_their_shares() -> None:
    for shares in ([1, 1, 1], [2, 3], [5, 0, 2, 0], [0.003, 0.5, 0.2, 4.0, 1e-9], [7]):
        exact = [Fraction(share) for share in shares]
        before = [0] * len(shares)
        for rows in range(1, 3000):
            counts = shared_out(rows, exact)
            assert sum(counts) == rows and all(a <= b for a, b in zip(before, counts, strict=True))
            for count, share in zip(counts, exact, strict=True):
                assert abs(count - rows * share / sum(exact)) <= Fraction(len(shares) - 1, 2)
            before = counts


def test_a_sample_that_comes_again_has_another_key() -> None:
    plan = make(sizes=SIZES, proportions=(1, 1, 8))
    seen: list[tuple[int, int]] = []
    for batch in islice(plan.batches(), 400):
        seen += zip(batch.sample.tolist(), batch.key.tolist(), strict=True)
    assert Counter(sample for sample, _ in seen).most_common(1)[0][1] > 50
    assert len({key for _, key in seen}) == len(seen)


@pytest.mark.parametrize(("proportions", "said"), [
    ((1.0, 0.0, 2.0), "1 0 2: each must be above 0"), ((1.0, -1.0, 2.0), "1 -1 2: each must be above 0"),
    ((1.0, float("nan"), 2.0), "above 0"), ((1.0, float("inf"), 2.0), "above 0"),
    ((1.0, 2.0), "1 2: 2 for 3 folders"), ((), "0 for 3 folders"),
])  # fmt: skip
def test_proportions_are_checked(proportions: tuple, said: str) -> None:
    with pytest.raises(UserError, match=f"--proportions .*{said}"):
        make(sizes=SIZES, proportions=proportions)


def test_an_empty_corpus_is_no_trouble_but_has_no_proportion() -> None:
    plan = make(sizes=(0, 1003, 0))
    assert len(set(np.concatenate([batch.sample for batch in epoch(plan)]).tolist())) == 1000
    with pytest.raises(UserError, match="--proportions 1 1 1: folder 1 holds no samples"):
        make(sizes=(0, 1003, 0), proportions=(1, 1, 1))
    with pytest.raises(ValueError, match="not the 1003 samples"):
        make(sizes=(1000, 2))


def test_the_budget_is_kept_and_filled() -> None:
    plan = make()
    totals = [(len(batch), plan.costs[batch.sample].sum()) for batch in epoch(plan)]
    assert all(cost <= plan.budget or rows == plan.multiple for rows, cost in totals)
    within = [cost for _, cost in totals if cost <= plan.budget]
    assert np.mean(within) > 0.75 * plan.budget


def test_the_samples_of_a_batch_cost_alike() -> None:
    plan = make()
    costs = [plan.costs[batch.sample] for batch in epoch(plan)]
    ordinary = [few[few < 5000] for few in costs]
    assert np.mean([few.std() for few in ordinary if len(few)]) < 0.4 * np.concatenate(ordinary).std()


@pytest.mark.parametrize("proportions", [None, (1.0, 2.0, 3.0)])
def test_any_boundary_resumes_and_others_are_refused(proportions: tuple | None) -> None:
    plan = make(sizes=SIZES, proportions=proportions)
    whole = list(islice(plan.batches(), 150))
    assert whole[-1].epoch > 0
    for batch in whole:
        assert same(plan.batch_at(batch.position), batch), "whatever was asked before"
    for start in range(0, 147, 13):
        resumed = list(islice(make(sizes=SIZES, proportions=proportions).batches(whole[start].position), 3))
        assert all(same(a, b) for a, b in zip(resumed, whole[start : start + 3], strict=True))
    boundaries = {batch.position for batch in whole}
    with pytest.raises(UserError, match="no batch begins at position"):
        plan.batch_at(next(p for p in range(100) if p not in boundaries))
    with pytest.raises(UserError):
        plan.batch_at(-8)


def test_position_counts_over_epochs() -> None:
    batches = list(islice(make().batches(), 150))
    assert [b.position for b in batches[1:]] == [b.next_position for b in batches[:-1]]
    assert batches[-1].epoch > 0


def test_seeds_differ() -> None:
    assert not np.array_equal(make(seed=1).batch_at(0).sample, make(seed=2).batch_at(0).sample)


def test_task_shares_are_exact() -> None:
    batches = list(islice(make().batches(), 600))
    rows = np.array([len(batch) for batch in batches])
    shares = np.array(TASKS.shares)
    counts = np.array([np.bincount(batch.task, minlength=3) for batch in batches])
    assert (np.abs(counts - rows[:, None] * shares) < 1).all()
    assert np.abs(counts.sum(0) / rows.sum() - shares).max() < 0.002


def test_a_task_without_share_is_never_dealt() -> None:
    plan = make(tasks=Tasks(("a", "b", "c"), (0.0, 3.0, 0.0)))
    assert all((batch.task == 1).all() for batch in epoch(plan))


def test_partners_are_other_pictures_of_the_same_batch() -> None:
    plan = make()
    seen = 0
    for batch in islice(plan.batches(), 200):
        needs = batch.task == 2
        assert (batch.partners[~needs] == -1).all()
        assert np.isin(batch.partners[needs], batch.sample).all()
        pictures = plan.key_hash[np.column_stack([batch.sample[needs], batch.partners[needs]])]
        assert all(len(set(row)) == 3 for row in pictures.tolist())
        seen += needs.sum()
    assert seen > 500


def test_partners_come_from_the_same_corpus_while_it_has_any() -> None:
    plan = make(sizes=SIZES, proportions=(1, 1, 0.02), tasks=Tasks(("match",), (1.0,), ("match",)))
    own = others = 0
    for batch in islice(plan.batches(), 200):
        corpus, theirs = (np.digitize(numbers, np.cumsum(SIZES)) for numbers in (batch.sample, batch.partners))
        assert (batch.partners >= 0).all()
        for row, picture in enumerate(plan.key_hash[batch.sample]):
            here = set(plan.key_hash[batch.sample[corpus == corpus[row]]].tolist()) - {int(picture)}
            assert (theirs[row] == corpus[row]).sum() == min(2, len(here))
            own, others = own + (len(here) > 1), others + (len(here) < 2)
    assert own > 1000 and others > 10


def test_a_batch_of_two_pictures_has_no_partners() -> None:
    plan = Plan(0, np.ones(8, np.int64), 8, Tasks(("match",), (1.0,), ("match",)), np.arange(8) % 2)
    assert (plan.batch_at(0).partners == -1).all()


@pytest.mark.parametrize(("world", "micros"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_ranks_and_micro_batches_share_the_global_batch(world: int, micros: int) -> None:
    for batch in islice(make(sizes=SIZES, proportions=(1, 1, 1)).batches(), 20):
        for micro in range(micros):
            parts = [split(batch, rank, world, micro, micros) for rank in range(world)]
            assert {len(part) for part in parts} == {len(batch) // world // micros}
            for name in ("sample", "task", "partners", "key"):
                joined = np.stack([getattr(part, name) for part in parts], 1)
                whole = getattr(batch, name)[micro::micros]
                assert np.array_equal(joined.reshape(whole.shape), whole)
            assert all((part.position, part.next_position) == (batch.position, batch.next_position) for part in parts)
    with pytest.raises(ValueError, match="do not split"):
        split(batch, 0, 3 * len(batch))
    with pytest.raises(ValueError, match="do not split"):
        split(batch, 0, 1, 0, 3 * len(batch))


def test_row_keys_belong_to_the_sample_and_its_turn() -> None:
    keys = row_keys(5, 1, np.arange(10_000))
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 10_000
    assert not set(keys.tolist()) & set(row_keys(5, 2, np.arange(10_000)).tolist())
    assert row_keys(5, 1, np.array([77]))[0] == keys[77]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UserError, match="7 samples do not fill one group of 8"):
        make(7)


@pytest.mark.parametrize(("change", "said"), [({"budget": 0}, "0 tokens"), ({"seed": -1}, "seed -1")])
def test_numbers_out_of_range_name_themselves_alone(change: dict[str, int], said: str) -> None:
    settings = {"seed": 0, "budget": 99} | change
    with pytest.raises(UserError, match=said) as error:
        Plan(**settings, costs=np.ones(99, int), tasks=Tasks(("a",), (1.0,)), key_hash=np.zeros(99, np.uint64))
    assert "multiple" not in str(error.value)


def test_tasks_are_checked() -> None:
    with pytest.raises(UserError):
        Tasks(("a",), (0.0,))
    with pytest.raises(ValueError, match="partnered"):
        Tasks(("a",), (1.0,), ("b",))


def test_steps_draw_each_task_equally_often_and_one_at_a_time() -> None:
    tasks = Tasks(("a", "b", "never", "c"), (0.5, 0.1, 0.0, 0.4), ("c",), one_a_step=True)
    plan = make(n=4000, tasks=tasks)
    batches = epoch(plan)
    drawn = [set(batch.task.tolist()) for batch in batches]
    assert all(len(tasks_of_batch) == 1 for tasks_of_batch in drawn)
    order = [min(tasks_of_batch) for tasks_of_batch in drawn]
    cycles = [order[start : start + 3] for start in range(0, len(order) - 3, 3)]
    assert all(sorted(cycle) == [0, 1, 3] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 6, "a random order each time"
    again = plan.batch_at(batches[-1].position)
    assert same(again, batches[-1]), "a function of the position alone"
    assert all((batch.partners >= 0).any() == (task == 3) for batch, task in zip(batches, order, strict=True))
