"""Training in stages: each begins with the model of the one before, moves what it names, and is not done twice."""

import dataclasses
from pathlib import Path

import pytest
import torch
from fixtures import fake_shards, tokenizer
from shrunken import ROWS, sample, small

from opt.checkpoint import from_pretrained, read_history
from opt.config import UserError
from opt.data.tokenizer import Tokenizer
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


def vocabulary(folder: Path) -> Path:
    tokenizer().save(folder)
    return folder / "tokenizer.json"


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
    ({"data": ("pairs=absent",)}, "absent is not a folder"),
])
def test_what_cannot_be_is_said(changes: dict, said: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        stages(config(shards, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_what_lacks_all_that_a_stage_shows_is_said_before_it_is_trained(shards: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    fake_shards(texts, [sample(number, image=False, speech=False) for number in range(ROWS)])
    for name, lacking in (("vision", texts), ("language", shards / "pictures")):
        out = tmp_path / name
        with pytest.raises(UserError, match=f"{lacking.name} holds nothing that vlmo.tiny reads in this stage"):
            stages(config(shards, out, order=(name,), data=(f"{name}={lacking}",), vocabulary=vocabulary(tmp_path)))
        assert not out.exists()


def test_another_order_is_refused_before_anything_is_trained(trained: Path, shards: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds the stage 1-vision, and this order is 1-language, 2-vision, 3-pairs"):
        stages(config(shards, trained, order=("language", "vision", "pairs")))
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_forgotten_start_is_named(trained: Path, shards: Path, tmp_path: Path) -> None:
    start = (f"model:{trained / '3-pairs' / 'model'}",)
    stages(config(shards, tmp_path, order=("language",), start=start))
    with pytest.raises(UserError, match="began with other weights than --start names now"):
        stages(config(shards, tmp_path, order=("language",)))


def test_a_dry_run_leaves_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages(config(shards, tmp_path / "out", dry_run=True))
    assert "the stages behind vision" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_words_of_a_call_that_trained_nothing_are_not_those_of_the_next(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "words").mkdir(parents=True)
    Tokenizer.train(["other words"] * 4, 40).save(out / "words")
    stages(config(shards, out, order=("language",)))
    assert "star" in (out / "words" / "tokenizer.json").read_text()
    kept = from_pretrained(out / "1-language" / "model").tokenizer.fingerprint
    assert kept == Tokenizer.load(out / "words").fingerprint
