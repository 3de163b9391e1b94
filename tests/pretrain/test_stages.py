"""Training in stages: each begins with the model of the one before, moves what it names, and is not done twice."""

import dataclasses
from pathlib import Path

import pytest
import torch
from fixtures import fake_shards
from shrunken import ROWS, sample, small

from opt.checkpoint import from_pretrained, read_history
from opt.config import UserError
from opt.recipe import LoopConfig
from opt.systems.system import load
from pretrain.stages import StagesConfig, stages

SAMPLES = [sample(number) for number in range(ROWS)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    fake_shards(folder / "shards", SAMPLES)
    fake_shards(folder / "pictures", [dataclasses.replace(each, caption=None, speech=None, speech_codes=None)
                                      for each in SAMPLES])
    return folder


def config(shards: Path, out: Path, system: str = "vlmo.tiny", **changes: object) -> StagesConfig:
    loop = LoopConfig(steps=8, batch_tokens=2000, workers=0, log_every=2, save_every=4)
    return StagesConfig(system, (str(shards / "shards"),), out, small(system), loop=loop, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    stages(config(shards, out, data=(f"vision={shards / 'pictures'}",)))
    return out


def test_every_stage_is_a_run_that_begins_with_the_one_before(trained: Path) -> None:
    names = [f"{number}-{stage.name}" for number, stage in enumerate(load("vlmo.tiny").stages, 1)]
    assert sorted(path.name for path in trained.iterdir()) == sorted([*names, "words"])
    models = [from_pretrained(trained / name / "model") for name in names]
    assert [model.config.stage.name for model in models] == [name.partition("-")[2] for name in names]
    assert len({model.tokenizer.fingerprint for model in models}) == 1
    assert len(read_history(trained / names[-1] / "model")) == 3


def test_words_leave_what_pictures_learned_as_it_is(trained: Path) -> None:
    vision, language, pairs = (from_pretrained(trained / name / "model").eval()
                               for name in ("1-vision", "2-language", "3-pairs"))
    before, after, later = (model.features(SAMPLES, ["image"]) for model in (vision, language, pairs))
    assert torch.equal(before, after) and not torch.equal(after, later)
    assert not torch.equal(vision.features(SAMPLES, ["text"]), language.features(SAMPLES, ["text"]))


def test_stages_that_are_finished_are_left(trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*.safetensors")}
    stages(config(shards, trained, data=(f"vision={shards / 'pictures'}",)))
    assert before == {path: path.read_bytes() for path in trained.rglob("*.safetensors")}
    assert capsys.readouterr().out.count("is finished") == 3


def test_order_and_number_of_stages_can_be_others(shards: Path, tmp_path: Path) -> None:
    stages(config(shards, tmp_path, order=("language", "pairs")))
    assert {path.name for path in tmp_path.iterdir()} == {"1-language", "2-pairs", "words"}


@pytest.mark.parametrize(("changes", "said"), [
    ({"order": ("pairs", "hearing")}, "vision, language, pairs"),
    ({"order": ("pairs", "pairs")}, "a stage comes once"),
    ({"data": ("hearing=here",)}, "NAME one of vision, language, pairs"),
    ({"data": ("vision",)}, "NAME=FOLDER"),
    ({"system": "clip.tiny"}, "opt pretrain; in several are .*vlmo.tiny"),
])
def test_what_cannot_be_is_said(changes: dict, said: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        stages(config(shards, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
