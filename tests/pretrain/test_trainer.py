"""The trainer: N + M steps equal N steps, a stop, and M more; a run is refused when its settings change."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import fake_sample, fake_shards
from stopping import stopped_equals_whole
from training import MODEL, config

from opt.checkpoint import from_pretrained
from opt.cli import main
from opt.config import RunAgain, UserError
from opt.data.batch import Batch
from opt.data.shards import ShardReader
from opt.lock import alone
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import OPT, tiny
from opt.systems.system import Output, Progress
from pretrain.optim import learning_rate
from pretrain.run import PretrainConfig, pretrain
from pretrain.state import newest_state
from pretrain.trainer import Trainer, use_bfloat16
from pretrain.validation import Validation


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fake_shards(folder, [fake_sample(number) for number in range(64)])
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return from_pretrained(run / "model").state_dict()


def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_equals_whole(lambda out: pretrain(config(shards, out)), tmp_path, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]


def test_a_kill_in_the_middle_costs_what_follows_the_last_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config(shards, tmp_path / "whole"))
    step = Trainer.train_step

    def die_at_ten(self: Trainer, batches: object) -> object:
        if self.step == 9:
            raise RuntimeError("killed")
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", die_at_ten)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(config(shards, tmp_path / "killed"))
    (tmp_path / "killed" / "checkpoints" / ".step-00000009.tmp").mkdir()  # what a kill while saving leaves
    (tmp_path / "killed" / "checkpoints" / "step-00000010").mkdir()
    monkeypatch.undo()
    pretrain(config(shards, tmp_path / "killed"))
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_loss_falls_below_guessing(shards: Path, tmp_path: Path) -> None:
    pretrain(dataclasses.replace(config(shards, tmp_path, steps=60, batch_tokens=1500), optim=OptimConfig(5e-3)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["losses"]["dir"] < 0.8 * lines[0]["losses"]["dir"]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    shown = {"loss", "losses", "tokens_per_second", "wait_share", "gradient_norm", "learning_rate", "seconds"}
    assert shown < set(lines[0])


def test_another_setting_or_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    pretrain(config(shards, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match=r"loop\.steps = 2"):
        pretrain(config(shards, tmp_path / "run", steps=3))
    pretrain(config(shards, tmp_path / "run", steps=2, log_every=1))  # what is not learned from may change
    fake_shards(tmp_path / "other", [fake_sample(number) for number in range(100, 140)])
    with pytest.raises(UserError, match="data|shards"):
        pretrain(config(tmp_path / "other", tmp_path / "run", steps=2))


def test_dry_run_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(dataclasses.replace(config(shards, tmp_path / "run"), dry_run=True))
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_batch_holds_the_tokens_asked_for(shards: Path, tmp_path: Path) -> None:
    """The plan's estimate of a sample's cost bounds what the preparer packs."""
    reader = ShardReader(shards)
    pretrain(config(shards, tmp_path, steps=1))
    loop = LoopConfig(batch_tokens=500, workers=0)
    trainer = Trainer(from_pretrained(tmp_path / "model"), reader, tmp_path / "new", loop, OptimConfig())
    for (batch,), _ in itertools.islice(trainer.loader(), 4):
        assert 200 < batch.tokens < 1.6 * 500 + 65 * len(batch.keys)


def test_the_learning_rate_rises_then_falls() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup=0.1, final=0.0)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(100, 100, optim) == pytest.approx(0.0)


@pytest.mark.parametrize(("changes", "rule"), [
    ({"steps": 0}, "--loop.steps 0 must be from 1"), ({"log_every": 0, "keep": 0}, "--loop.log-every 0.*--loop.keep 0"),
    ({"batch_tokens": -1}, "--loop.batch-tokens -1"), ({"accumulate": 0}, "--loop.accumulate 0"),
    ({"seed": 2**63}, "--loop.seed 9223372036854775808 must be"),
])
def test_impossible_numbers_are_refused(shards: Path, tmp_path: Path, changes: dict, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        pretrain(config(shards, tmp_path / "run", **changes))


@pytest.mark.parametrize("optim", [OptimConfig(learning_rate=-1.0), OptimConfig(learning_rate=float("nan")),
                                   OptimConfig(beta2=2.0), OptimConfig(clip=0.0)])
def test_impossible_rates_are_refused(shards: Path, tmp_path: Path, optim: OptimConfig) -> None:
    with pytest.raises(UserError, match="must be"):
        pretrain(dataclasses.replace(config(shards, tmp_path / "run"), optim=optim))


def test_a_model_that_cannot_be_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="width 7 must be a multiple of heads"):
        pretrain(dataclasses.replace(config(shards, tmp_path), model=dataclasses.replace(MODEL, width=7)))


@pytest.mark.parametrize(("words", "said"), [
    (["--shards", "there", "--out", "here"], "system's preset"),
    (["dvae.tiny", "--shards", "SHARDS", "--out", "OUT", "--vocabulary", "vocab.txt"], "leave out --vocabulary"),
])  # fmt: skip
def test_command_lines_that_make_no_sense(
    shards: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SHARDS": str(shards), "OUT": str(tmp_path / "run")}
    assert main(["pretrain", *(places.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_share_a_folder(shards: Path, tmp_path: Path) -> None:
    with alone(tmp_path / "run"), pytest.raises(UserError, match="another job is writing"):
        pretrain(config(shards, tmp_path / "run"))


def test_a_moved_run_goes_on(shards: Path, tmp_path: Path) -> None:
    pretrain(config(shards, tmp_path / "run", steps=2))
    (tmp_path / "run").rename(tmp_path / "moved")
    pretrain(config(shards, tmp_path / "moved", steps=2))


def test_options_may_stand_before_the_preset() -> None:
    kind, default = PretrainConfig.prepare(["--out", "runs/x", "opt.tiny", "--shards", "s"])
    assert default.system == "opt.tiny" and default.model == tiny().model


def test_a_damaged_configuration_is_a_sentence(shards: Path, tmp_path: Path) -> None:
    pretrain(config(shards, tmp_path, steps=1))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="damaged"):
        pretrain(config(shards, tmp_path, steps=1))


def test_a_run_that_has_saved_nothing_begins_anew(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Trainer, "train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        pretrain(config(shards, tmp_path))
    pretrain(config(shards, tmp_path, batch_tokens=300, steps=2))


def test_a_reader_that_fails_costs_no_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(shards, tmp_path / "whole"))
    sample, read = ShardReader.sample, itertools.count()

    def vanish(self: ShardReader, number: int, jpeg: bool = False) -> object:
        if next(read) > 60:
            raise UserError("the server is gone")
        return sample(self, number, jpeg)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="the server is gone"):
        patched.setattr(ShardReader, "sample", vanish)
        pretrain(config(shards, tmp_path / "run", save_every=100))
    newest = newest_state(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name != "step-00000000"
    pretrain(config(shards, tmp_path / "run", save_every=100))
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], run[name]) for name in whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_for_data_does_not_keep_a_run_from_stopping(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    sample, read = ShardReader.sample, itertools.count()

    def hang(self: ShardReader, number: int, jpeg: bool = False) -> object:
        if next(read) > 60:
            time.sleep(600)
        return sample(self, number, jpeg)

    monkeypatch.setattr(ShardReader, "sample", hang)
    told = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
    told.start()
    began = time.monotonic()
    with pytest.raises(RunAgain, match="stopped as asked"):
        pretrain(config(shards, tmp_path, save_every=100, workers=workers))
    for process in multiprocessing.active_children():  # told to end, and on a busy machine not yet gone
        process.join(10)
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()
    newest = newest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name > "step-00000000"


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """The loss of the steps that `bad` names is not a number."""
    forward = OPT.forward

    def poison(self: OPT, batch: Batch, progress: Progress) -> Output:
        output = forward(self, batch, progress)
        mlm = output.terms["mlm"]
        factor = float("nan") if bad(progress.step) else 1.0
        return Output({**output.terms, "mlm": dataclasses.replace(mlm, total=mlm.total * factor)}, output.carry)

    monkeypatch.setattr(OPT, "forward", poison)


def test_a_step_that_is_not_finite_moves_nothing_and_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, lambda step: step == 3)
    before: dict[int, dict[str, torch.Tensor]] = {}
    step = Trainer.train_step

    def remembered(self: Trainer, batches: list[Batch]) -> object:
        before[self.step] = {name: value.clone() for name, value in self.system.state_dict().items()}
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", remembered)
    pretrain(config(shards, tmp_path))
    assert all(torch.equal(before[3][name], before[4][name]) for name in before[3])
    assert any(not torch.equal(before[2][name], before[3][name]) for name in before[3])
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 4 and len(json.loads(line)["keys"]) >= 8
    assert "step 4 was skipped" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_dry_run_leaves_a_runs_folder_as_it_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was named beyond the newest state, which a run at work has yet to save."""
    with monkeypatch.context() as patched:
        poisoned(patched, lambda step: step == 3)
        pretrain(config(shards, tmp_path))
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "keys": []}) + "\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pretrain(dataclasses.replace(config(shards, tmp_path), dry_run=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_too_many_in_a_row_end_the_run_and_what_was_learned_is_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda step: step in (1, 2) or step >= 5)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, the last of them 8.*skipped\.jsonl"):
        pretrain(config(shards, tmp_path, max_skipped=3))
    newest = newest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"
    with pytest.raises(UserError, match="the last of them 8"):  # the count is part of the state
        pretrain(config(shards, tmp_path, max_skipped=3))


def validated(shards: Path, out: Path, held_out: Path, **changes: object) -> PretrainConfig:
    loop = {"validate_every": 3, "validate_batches": 2, **changes}
    return dataclasses.replace(config(shards, out, **loop), validation=str(held_out))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    fake_shards(folder, [fake_sample(number) for number in range(200, 224)])
    return folder


def validations(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}


def test_validation_keeps_the_best_model(shards: Path, tmp_path: Path, held_out: Path) -> None:
    pretrain(validated(shards, tmp_path, held_out))
    losses = validations(tmp_path)
    assert list(losses) == [3, 6, 9, 12]
    best = from_pretrained(tmp_path / "best")
    again = Validation(ShardReader(held_out), best.preparer(), config(shards, tmp_path, validate_batches=2).loop)
    bfloat16 = use_bfloat16("auto", torch.device("cpu"))
    values = again.run(best, torch.device("cpu"), bfloat16, Progress(12, 1.0))
    assert values["loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_validating_changes_nothing_that_is_learned(shards: Path, tmp_path: Path, held_out: Path) -> None:
    pretrain(config(shards, tmp_path / "plain"))
    pretrain(validated(shards, tmp_path / "validated", held_out, workers=1))
    plain, with_validation = weights(tmp_path / "plain"), weights(tmp_path / "validated")
    assert all(torch.equal(plain[name], with_validation[name]) for name in plain)


def test_a_run_ends_early_and_stays_ended(
    shards: Path, tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    monkeypatch.setattr(Validation, "run", lambda *_: {"loss": next(losses), "losses": {}})
    ended = validated(shards, tmp_path, held_out, patience=2, validate_every=2, steps=20)
    pretrain(ended)
    assert "trained 8 steps, ended early: no better loss since step 4" in capsys.readouterr().out
    assert validations(tmp_path) == {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5}
    pretrain(ended)
    assert "is finished: 8 steps" in capsys.readouterr().out


def test_patience_survives_a_stop(
    shards: Path, tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5}

    def known(self: Validation, module: object, device: object, bfloat16: bool, progress: Progress) -> dict:
        return {"loss": losses[progress.step], "losses": {}}

    monkeypatch.setattr(Validation, "run", known)
    step = Trainer.train_step

    def stop_after_seven(self: Trainer, batches: list[Batch]) -> object:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    ended = validated(shards, tmp_path, held_out, patience=2, validate_every=2, steps=20)
    with monkeypatch.context() as patched, pytest.raises(RunAgain):
        patched.setattr(Trainer, "train_step", stop_after_seven)
        pretrain(ended)
    pretrain(ended)
    assert list(validations(tmp_path)) == [2, 4, 6, 8]


def test_validation_needs_held_out_shards(shards: Path, tmp_path: Path, held_out: Path) -> None:
    with pytest.raises(UserError, match="need --validation"):
        pretrain(config(shards, tmp_path, validate_every=3))
    pretrain(dataclasses.replace(config(shards, tmp_path, validate_batches=1), validation=str(held_out)))
    assert list(validations(tmp_path)) == [4, 8, 12], "whenever a state is saved"


def test_a_run_starts_warm_from_another_model(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config(shards, tmp_path / "first", steps=3))
    start = f"model:{tmp_path / 'first' / 'model'}"
    warm = dataclasses.replace(config(shards, tmp_path / "warm", steps=1), start=(start,), optim=OptimConfig(1e-12))
    pretrain(warm)
    assert "begins with the weights of model:" in capsys.readouterr().out
    first, after = weights(tmp_path / "first"), weights(tmp_path / "warm")
    assert all(torch.allclose(first[name], after[name], atol=1e-9) for name in first)
    with pytest.raises(UserError, match="began without --start|start = "):
        pretrain(dataclasses.replace(config(shards, tmp_path / "first", steps=3), start=(start,)))
    wide = dataclasses.replace(MODEL, width=32)
    with pytest.raises(UserError, match=r"\(.*16.*\), not \(.*32.*\).*--model"):
        pretrain(dataclasses.replace(config(shards, tmp_path / "wide"), start=(start,), model=wide))


def test_several_corpora_in_proportions(shards: Path, tmp_path: Path) -> None:
    fake_shards(tmp_path / "pairs", [fake_sample(number, speech=False) for number in range(100, 140)])
    several = dataclasses.replace(config(shards, tmp_path / "run"), shards=(str(shards), str(tmp_path / "pairs")),
                                  proportions=(1.0, 3.0))
    pretrain(several)
    with pytest.raises(UserError, match="proportions"):
        pretrain(dataclasses.replace(several, proportions=(1.0, 2.0)))
    with pytest.raises(UserError, match="--proportions"):
        pretrain(dataclasses.replace(several, out=tmp_path / "other", proportions=(1.0,)))
