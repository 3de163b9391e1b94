"""The plan: every property the trainer relies on, over odd sizes and costs."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from opt.config import UserError
from opt.data.plan import BatchPlan, Plan, Tasks, row_keys, split

TASKS = Tasks(("mlm", "dtr", "match"), (0.25, 0.45, 0.3), ("match",))


def make(n: int = 1003, seed: int = 3, budget: int = 2000, multiple: int = 8, tasks: Tasks = TASKS) -> Plan:
    rng = np.random.default_rng(n)
    costs = rng.integers(10, 120, size=n)
    costs[::97] = 5000  # some alone exceed the budget
    pictures = rng.integers(n // 3 + 1, size=n).astype(np.uint64)
    return Plan(seed, costs, budget, tasks, pictures, multiple)


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
def test_an_epoch_uses_every_sample_at_most_once(n: int, multiple: int, budget: int) -> None:
    plan = make(n, multiple=multiple, budget=budget)
    batches = epoch(plan)
    used = np.concatenate([batch.sample for batch in batches])
    assert len(used) == len(set(used.tolist())) == plan.samples_per_epoch == n // multiple * multiple
    assert all(batch.epoch == 0 for batch in batches)
    assert all(len(batch) % multiple == 0 for batch in batches)


def test_epochs_differ_in_order_and_remainder() -> None:
    plan = make()
    first, second = (np.concatenate([batch.sample for batch in epoch(plan, number)]) for number in (0, 1))
    assert not np.array_equal(first, second)
    assert set(first.tolist()) != set(second.tolist())


def test_the_budget_is_kept_and_filled() -> None:
    plan = make()
    totals = [(len(batch), plan.costs[batch.sample].sum()) for batch in epoch(plan)]
    assert all(cost <= plan.budget or rows == plan.multiple for rows, cost in totals)
    within = [cost for _, cost in totals if cost <= plan.budget]
    assert np.mean(within) > 0.75 * plan.budget


def test_any_boundary_resumes_and_others_are_refused() -> None:
    whole = list(islice(make().batches(), 150))
    boundaries = {batch.position for batch in whole}
    for start in range(0, 147, 13):
        resumed = list(islice(make().batches(whole[start].position), 3))
        assert all(same(a, b) for a, b in zip(resumed, whole[start : start + 3], strict=True))
    with pytest.raises(UserError, match="no batch begins at position"):
        make().batch_at(next(p for p in range(100) if p not in boundaries))
    with pytest.raises(UserError):
        make().batch_at(-8)


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


def test_a_batch_of_two_pictures_has_no_partners() -> None:
    plan = Plan(0, np.ones(8, np.int64), 8, Tasks(("match",), (1.0,), ("match",)), np.arange(8) % 2)
    assert (plan.batch_at(0).partners == -1).all()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_the_global_batch(world: int) -> None:
    for batch in islice(make().batches(), 20):
        parts = [split(batch, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {len(batch) // world}
        for name in ("sample", "task", "partners", "key"):
            joined = np.stack([getattr(part, name) for part in parts], 1)
            assert np.array_equal(joined.reshape(getattr(batch, name).shape), getattr(batch, name))
        assert all((part.position, part.next_position) == (batch.position, batch.next_position) for part in parts)
    with pytest.raises(ValueError, match="do not split"):
        split(batch, 0, 3 * len(batch))


def test_row_keys_belong_to_the_sample_and_the_epoch() -> None:
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
