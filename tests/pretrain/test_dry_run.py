"""The dry run: what it says is so, it writes nothing, and what cannot fit is refused before the first step."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from training import MODEL, Job, config, train

from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.shards import ShardReader
from opt.systems.opt import OPT
from pretrain import dry_run
from pretrain.dry_run import in_flop
from pretrain.run import pretrain
from pretrain.trainer import Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fake_shards(folder, [fake_sample(number) for number in range(64)])
    return folder


def said(shards: Path, out: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    pretrain(dataclasses.replace(config(shards, out, **changes), dry_run=True))
    return capsys.readouterr().out


def test_everything_is_said_and_nothing_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, step = [], Trainer.train_step

    def counted(self: Trainer, batches: list) -> object:
        taken.append(len(batches))
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", counted)
    text = said(shards, tmp_path / "run", capsys, accumulate=2, steps=24)
    labels = [line.split()[0] for line in text.splitlines() if line[0] != " "]
    assert labels == ["system", "runs", "data", "steps", "batch", "epochs", "memory", "disk", "work", "speed", "held",
                      "time", "writes"]
    assert taken == [2] * 4 and "by 3 steps just tried" in text and not (tmp_path / "run").exists()
    assert f"{shards}: 64 samples" in text
    rows, tokens = map(float, re.findall(r"batch +([\d.]+) rows of ([\d,]+) tokens", text.replace(",", ""))[0])
    epochs = float(re.findall(r"epochs +([\d.]+)", text)[0])
    assert epochs == pytest.approx(24 * rows / 64, abs=0.03) and 250 < tokens <= 500 and "1 x 2 (processes" in text


@pytest.mark.parametrize(("proportions", "shares"), [((), ("80.0%", "20.0%")), ((1.0, 3.0), ("25.0%", "75.0%"))])
def test_shares_of_corpora_are_of_all_rows(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], proportions: tuple, shares: tuple
) -> None:
    fake_shards(tmp_path / "more", [fake_sample(number) for number in range(100, 116)])
    settings = dataclasses.replace(config(shards, tmp_path / "run"), shards=(str(shards), str(tmp_path / "more")))
    pretrain(dataclasses.replace(settings, proportions=proportions, dry_run=True))
    assert tuple(re.findall(r"; ([\d.]+%) of the rows", capsys.readouterr().out)) == shares


def test_parameters_memory_and_disk_are_those_of_the_model(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(shards, tmp_path / "run", keep=3, steps=1)
    settings = dataclasses.replace(settings, model=dataclasses.replace(MODEL, width=128))
    pretrain(dataclasses.replace(settings, dry_run=True))
    text = capsys.readouterr().out
    pretrain(settings)
    parameters = sum(tensor.numel() for tensor in from_pretrained(tmp_path / "run" / "model").parameters())
    assert f"{parameters:,} parameters" in text
    bytes_of = dict(re.findall(r"^ +(\w+) +([\d.]+ \w+)$", text, flags=re.M))
    assert bytes_of["weights"] == bytes_of["gradients"] == f"{4 * parameters / 1e6:.1f} MB"
    state, keep = re.findall(r"states ([\d.]+) MB x (\d)", text)[0]
    total = float(re.findall(r"disk +about ([\d.]+) MB", text)[0])
    assert total == pytest.approx((4 * 12 + 4) * parameters / 1e6, abs=0.1)  # three, one being written, the model
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    assert keep == "3" and float(state) == pytest.approx(12 * parameters / 1e6, abs=0.1)
    assert float(state) == pytest.approx(written, rel=0.25)  # names and places take 1 MB


def test_states_that_cannot_fit_are_refused_with_what_helps(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "available", lambda device: 1000)
    for dry in (True, False):
        with pytest.raises(UserError, match=r"weights, gradients and moments take .* kB.*fsdp"):
            pretrain(dataclasses.replace(config(shards, tmp_path / f"run{dry}"), dry_run=dry))
    assert not (tmp_path / "runTrue").exists() and not (tmp_path / "runFalse" / "metrics.jsonl").exists()


def test_a_batch_that_may_not_fit_is_a_warning_and_no_step_is_tried(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = 4 * sum(parameter.numel() for parameter in _trainer(shards, tmp_path).system.parameters())
    monkeypatch.setattr(dry_run, "available", lambda device: 4 * weights + 100)  # states, no batch
    monkeypatch.setattr(Trainer, "train_step", None)
    text = said(shards, tmp_path / "run", capsys)
    assert "WARNING: that may be more than there is; lower --loop.batch-tokens" in text and "not measured" in text


def test_a_full_disk_is_a_warning(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = dry_run.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert "WARNING: that is more than is free; lower --loop.keep" in said(shards, tmp_path / "run", capsys)


def test_what_a_run_holds_already_counts_as_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on has its moments; what is still free need not hold them once more."""
    monkeypatch.setattr(dry_run, "available", lambda device: 0)
    trainer = _trainer(shards, tmp_path)
    weights = sum(parameter.nbytes for parameter in trainer.system.parameters())
    assert dry_run._there(trainer) == weights
    for parameter in trainer.system.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    assert dry_run._there(trainer) == pytest.approx(3 * weights, rel=0.01)


def test_processes_that_share_the_model_try_their_steps_together(shards: Path, tmp_path: Path) -> None:
    shared = dataclasses.replace(config(shards, tmp_path / "run", parallel="fsdp"), dry_run=True)
    assert Job(2, train, shared).wait() == [0, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "words"), [(2.1e18, "2.1 EFLOP"), (4.4e12, "4.4 TFLOP"), (5e5, "0.5 MFLOP")])
def test_operations_are_said_as_people_do(count: float, words: str) -> None:
    assert in_flop(count) == words


def _trainer(shards: Path, folder: Path) -> Trainer:
    settings = config(shards, folder)
    return Trainer(OPT(MODEL, tokenizer(), FACTS), ShardReader(shards), folder, settings.loop, settings.optim)
