"""The trainer: N + M steps equal N steps, a stop, and M more; a run is refused when its settings change."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from fixtures import fake_sample, fake_shards
from stopping import stopped_equals_whole

from opt.checkpoint import from_pretrained, newest_state
from opt.cli import main
from opt.config import UserError
from opt.data.shards import ShardReader
from opt.lock import alone
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import tiny
from pretrain.metrics import Meter
from pretrain.optim import learning_rate
from pretrain.run import PretrainConfig, pretrain
from pretrain.trainer import Trainer

MODEL = dataclasses.replace(
    tiny().model, width=16, layers=1, heads=2, inner=32, decoder_layers=1, alignment_width=8, dropout=0.1
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fake_shards(folder, [fake_sample(number) for number in range(64)])
    return folder


def config(shards: Path, out: Path, **changes: object) -> PretrainConfig:
    loop = LoopConfig(**{"steps": 12, "batch_tokens": 500, "workers": 0, "log_every": 2, "save_every": 4, **changes})
    return PretrainConfig("opt.tiny", shards, out, MODEL, loop=loop)


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

    def die_at_ten(self: Trainer, batch: object) -> object:
        if self.step == 9:
            raise RuntimeError("killed")
        return step(self, batch)

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
    for batch, _ in itertools.islice(trainer._loader(), 4):
        assert 200 < batch.tokens < 1.6 * 500 + 65 * len(batch.keys)


def test_the_learning_rate_rises_then_falls() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup=0.1, final=0.0)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(100, 100, optim) == pytest.approx(0.0)


@pytest.mark.parametrize(("changes", "rule"), [
    ({"steps": 0}, "--steps 0 must be at least 1"), ({"log_every": 0, "keep": 0}, "--log-every 0.*--keep 0"),
    ({"batch_tokens": -1}, "--batch-tokens -1"), ({"precision": "int3"}, "precision"),
    ({"seed": 2**63}, "--seed 9223372036854775808 must be"),
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
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="damaged"):
        pretrain(config(shards, tmp_path))


def test_a_loss_that_is_not_finite_is_never_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def run_off(self: Trainer, batch: object) -> object:
        terms, total, norm = step(self, batch)
        return terms, total * float("nan") if self.step >= 5 else total, norm

    monkeypatch.setattr(Trainer, "train_step", run_off)
    with pytest.raises(UserError, match="not finite at step 8"):
        pretrain(config(shards, tmp_path, log_every=100))
    newest = newest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"


def test_a_term_that_counted_nothing_is_not_logged_as_nought() -> None:
    meter = Meter()
    meter.add({"some": Term(torch.tensor(6.0), torch.tensor(3.0)), "none": Term(torch.tensor(0.0), torch.tensor(0.0))},
              torch.tensor(2.0), 10)
    assert meter.line(0.0)["losses"] == {"some": 2.0}
