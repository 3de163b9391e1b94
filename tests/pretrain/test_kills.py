"""Kill -9 at random moments of a run, started again each time: the final weights are bit-equal to those of a run
that nothing happened to. In one process and in two."""

import random
import time
from pathlib import Path

import pytest
import torch
from fixtures import fake_sample, fake_shards
from training import Job, config, train

from opt.checkpoint import from_pretrained
from pretrain.state import newest_state


@pytest.mark.parametrize(("world", "kills"), [
    (1, 3), (2, 2), pytest.param(1, 10, marks=pytest.mark.slow), pytest.param(2, 10, marks=pytest.mark.slow),
])
def test_kills_change_nothing(world: int, kills: int, tmp_path: Path) -> None:
    fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(64)])
    length = {"steps": 9 * kills, "save_every": 3, "log_every": 10}
    whole, killed = (config(tmp_path / "shards", tmp_path / name, **length) for name in ("whole", "killed"))
    assert Job(world, train, whole).wait() == [0] * world
    chance = random.Random(world)
    for number in range(kills):
        job = Job(world, train, killed)
        if number % 3:  # while it trains and saves
            wait_for_a_state_after(newest_state(killed.out / "checkpoints"), killed.out / "checkpoints")
            time.sleep(chance.uniform(0.0, 0.3))
        else:  # while it starts
            time.sleep(chance.uniform(0.0, 2.0))
        assert any(process.is_alive() for process in job.processes), "it came to its end before the last kill"
        job.kill()
    assert Job(world, train, killed).wait() == [0] * world
    expected, found = (from_pretrained(run.out / "model").state_dict() for run in (whole, killed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list(killed.out.rglob("*.tmp"))


def wait_for_a_state_after(seen: Path | None, folder: Path) -> None:
    end = time.monotonic() + 60
    while newest_state(folder) == seen:
        assert time.monotonic() < end, "nothing was saved in a minute"
        time.sleep(0.01)
