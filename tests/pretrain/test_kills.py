"""Kill -9 at ten random moments of a run, started again each time: the final weights are bit-equal to those of a run
that nothing happened to. In one process and in two."""

import random
import time
from pathlib import Path

import pytest
import torch
from fixtures import fake_sample, fake_shards
from training import Job, config, train

from opt.checkpoint import from_pretrained

KILLS = 10


@pytest.mark.parametrize("world", [1, 2])
def test_ten_kills_change_nothing(world: int, tmp_path: Path) -> None:
    fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(64)])
    chosen = {"steps": 60, "save_every": 3}
    began = time.monotonic()
    assert Job(world, train, config(tmp_path / "shards", tmp_path / "whole", **chosen)).wait() == [0] * world
    whole_seconds = time.monotonic() - began
    chance, moments, kills = random.Random(world), [], 0
    while kills < KILLS:
        job = Job(world, train, config(tmp_path / "shards", tmp_path / "killed", **chosen))
        time.sleep(chance.uniform(0.3, 1.0) * whole_seconds)
        if not any(process.is_alive() for process in job.processes):
            break  # it came to its end between kills
        job.kill()
        kills += 1
        moments.append(len(list((tmp_path / "killed" / "checkpoints").glob("step-*"))))
    assert kills >= 3 and max(moments) > 0, "the kills came before anything was saved"
    assert Job(world, train, config(tmp_path / "shards", tmp_path / "killed", **chosen)).wait() == [0] * world
    whole, killed = (from_pretrained(tmp_path / run / "model").state_dict() for run in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    left = [path.name for path in (tmp_path / "killed").rglob("*.tmp")]
    assert not left
