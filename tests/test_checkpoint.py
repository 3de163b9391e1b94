"""Models that are damaged, foreign or cut short are sentences."""

import json
import shutil
from pathlib import Path

import pytest
from fixtures import FACTS, tokenizer

from opt.checkpoint import from_pretrained, save_pretrained
from opt.config import UserError
from opt.systems.system import build, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(build("opt", load("opt.tiny").model, tokenizer(), FACTS), folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(model: Path, change) -> None:
    content = json.loads((model / "config.json").read_text())
    change(content)
    (model / "config.json").write_text(json.dumps(content))


def test_a_whole_model_loads(model: Path):
    from_pretrained(model)


def test_a_model_knows_the_codes_it_saw_and_an_older_one_loads_without(model: Path):
    facts = from_pretrained(model).facts
    assert (facts.speech_codebooks, facts.codes_grid) == ((12,), 8)
    edit(model, lambda content: [content["facts"].pop(name) for name in ("speech_codebooks", "codes_grid")])
    facts = from_pretrained(model).facts
    assert (facts.speech_codebooks, facts.codes_grid) == ((), 0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"system": 3}', "\udcff"])
def test_a_damaged_description_is_named(model: Path, content: str):
    (model / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json"):
        from_pretrained(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("facts"),
        lambda content: content["facts"].pop("region_width"),
        lambda content: content["facts"].update(region_width="wide"),
        lambda content: content["config"].update(width="192"),
        lambda content: content["config"].update(width=64),
        lambda content: content["config"].update(width=7),
    ],
)
def test_an_edited_description_is_named(model: Path, change):
    edit(model, change)
    with pytest.raises(UserError, match="config.json"):
        from_pretrained(model)


def test_missing_and_foreign_files_are_named(model: Path):
    (model / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json"):
        from_pretrained(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        from_pretrained(model)


def test_another_tokenizer_of_the_same_size_is_refused(model: Path):
    path = model / "tokenizer.json"
    content = path.read_text()
    assert '"red"' in content and '"blue"' in content
    path.write_text(content.replace('"red"', '"RED"').replace('"blue"', '"red"').replace('"RED"', '"blue"'))
    with pytest.raises(UserError, match="another tokenizer"):
        from_pretrained(model)


def test_a_runs_folder_points_to_its_model(model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"loop": {}}')
    with pytest.raises(UserError, match=f"give {model}"):
        from_pretrained(tmp_path)
