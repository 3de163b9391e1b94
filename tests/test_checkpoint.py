"""Checkpoints that are damaged, foreign or cut short are sentences; a disk that fills up loses no older state."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, tokenizer

from opt.checkpoint import from_pretrained, load_state, newest_state, save_pretrained, save_state
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


def test_a_runs_folder_points_to_its_model(model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"loop": {}}')
    with pytest.raises(UserError, match=f"give {model}"):
        from_pretrained(tmp_path)


def state(value: float) -> dict:
    return {"weights": torch.full((1000,), value), "step": torch.tensor(int(value))}


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "flipped"])
def test_a_damaged_state_is_named_with_the_way_out(tmp_path: Path, damage: str):
    for step in (1, 2):
        save_state(tmp_path, step, state(step), keep=2)
    newest = newest_state(tmp_path)
    assert newest is not None
    (path,) = newest.glob("*.distcp")
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
    else:
        os.truncate(path, 100 if damage == "cut" else 0)
    with pytest.raises(UserError, match=r"step-00000002 is damaged.*delete that folder.*step-00000001"):
        load_state(newest, state(0))
    shutil.rmtree(newest)
    loaded, older = state(0), newest_state(tmp_path)
    assert older is not None
    load_state(older, loaded)
    assert loaded["weights"].tolist() == [1.0] * 1000


def test_a_full_disk_keeps_the_older_state_and_leaves_nothing_behind(tmp_path: Path):
    save_state(tmp_path, 1, state(1), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path, 2, state(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_saving_and_loading_say_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    save_state(tmp_path, 1, state(1), keep=1)
    load_state(tmp_path / "step-00000001", state(0))
    assert not [str(warning.message) for warning in recwarn if "torch.distributed" in str(warning.message)]
