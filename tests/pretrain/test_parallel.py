"""Two processes as one: whole runs under DDP and FSDP2 end with the weights of one process; a state written by two goes
on in one, in the same order of samples."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from fixtures import fake_sample, fake_shards
from torch.distributed.tensor import DTensor
from training import Job, config, train

from opt.checkpoint import from_pretrained
from opt.config import RunAgain
from opt.data.batch import Batch
from opt.recipe import OptimConfig
from opt.systems.opt import OPT
from opt.systems.system import Output, Progress
from pretrain.run import PretrainConfig, pretrain
from pretrain.state import newest_state
from pretrain.trainer import Trainer

EVERY_STEP = {"log_every": 1, "precision": "float32"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fake_shards(folder, [fake_sample(number, speech=number % 5 != 4, regions=number % 7 != 6) for number in range(64)])
    return folder


def run(shards: Path, out: Path, **changes: object) -> PretrainConfig:
    """Eight steps without dropout. A large epsilon keeps Adam from blowing up the last bits of small gradients."""
    base = config(shards, out, **{"steps": 8, **EVERY_STEP, **changes})
    return dataclasses.replace(base, model=dataclasses.replace(base.model, dropout=0.0), optim=OptimConfig(1e-3))


def record_keys(config: PretrainConfig) -> None:
    """Train, and write down the samples of every step beside the run."""
    step = Trainer.train_step

    def recorded(self: Trainer, batches: list) -> object:
        keys = [key for batch in batches for key in batch.keys]
        with (config.out / "keys.jsonl").open("a") as file:
            file.write(json.dumps([self.step, keys]) + "\n")
        return step(self, batches)

    Trainer.train_step = recorded  # type: ignore[method-assign]
    try:
        pretrain(config)
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    for step, (expected, found) in enumerate(zip(losses(one), losses(other), strict=True)):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (step, name)
    weights, others = (from_pretrained(out / "model").state_dict() for out in (one, other))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=5e-4, msg=lambda text, at=name: f"{at}: {text}")


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    record_keys(run(shards, out))
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(shards: Path, one: Path, tmp_path: Path, parallel: str) -> None:
    assert Job(2, train, run(shards, tmp_path, parallel=parallel)).wait() == [0, 0]
    assert_same_run(one, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_micro_batches_and_processes_train_as_one(shards: Path, tmp_path: Path) -> None:
    """Without contrast, whose negatives are those of a micro-batch."""
    for out, accumulate in (("one", 1), ("two", 2)):
        config = run(shards, tmp_path / out, accumulate=accumulate)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, alignment_weight=0.0))
        if out == "one":
            pretrain(config)
        else:
            assert Job(2, train, config).wait() == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_state_of_two_goes_on_in_one(shards: Path, one: Path, tmp_path: Path, parallel: str) -> None:
    config = run(shards, tmp_path, parallel=parallel)
    assert Job(2, stop_at_five, config).wait() == [75, 75]
    newest = newest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000005"
    record_keys(config)
    assert_same_run(one, tmp_path)
    expected, found = ([json.loads(line) for line in (out / "keys.jsonl").read_text().splitlines()]
                       for out in (one, tmp_path))
    assert found == expected[5:]


def stop_at_five(config: PretrainConfig) -> None:
    """One of the processes is told to stop in its fifth step; both save and end, to be run again."""
    step = Trainer.train_step

    def stopping(self: Trainer, batches: list) -> object:
        if self.step == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batches)

    Trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        pretrain(config)
    except RunAgain:
        os._exit(75)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_process_moves_nothing_on_any(shards: Path, tmp_path: Path, parallel: str) -> None:
    assert Job(2, poison_the_second, run(shards, tmp_path, parallel=parallel, save_every=3)).wait() == [0, 0]
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    keys = {sample.key for sample in map(fake_sample, range(64))}
    named = json.loads(line)
    assert named["step"] == 4 and len(named["keys"]) >= 8 and set(named["keys"]) <= keys
    assert sorted(path.name for path in tmp_path.glob("state-*")) == ["state-0", "state-1"]
    assert all((tmp_path / f"state-{rank}").read_text() == "unmoved" for rank in range(2))


def poison_the_second(config: PretrainConfig) -> None:
    """The fourth step's loss is infinite on one process; beside the run each says whether its weights moved."""
    rank, step, forward = int(os.environ["RANK"]), Trainer.train_step, OPT.forward

    def poisoned(self: OPT, batch: Batch, progress: Progress) -> Output:
        output = forward(self, batch, progress)
        bad = float("inf") if progress.step == 3 and rank == 1 else 1.0
        return Output({name: dataclasses.replace(term, total=term.total * bad) for name, term in output.terms.items()})

    def compared(self: Trainer, batches: list[Batch]) -> object:
        before = [local(parameter).clone() for parameter in self.system.parameters()]
        outcome = step(self, batches)
        same = all(torch.equal(old, local(new)) for old, new in zip(before, self.system.parameters(), strict=True))
        if self.step == 3:
            (config.out / f"state-{rank}").write_text("unmoved" if same else "moved")
        return outcome

    OPT.forward, Trainer.train_step = poisoned, compared  # type: ignore[method-assign]
    pretrain(config)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
