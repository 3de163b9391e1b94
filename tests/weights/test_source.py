"""Published checkpoints in every layout, and what an importer asks of them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opt.config import UserError
from opt.files import sha256
from opt.weights.source import Source
from opt.weights.state import read_state

STATE = {"a.weight": torch.arange(6.0).view(2, 3).half(), "a.bias": torch.ones(2), "b.weight": torch.zeros(1, 3),
         "b.bias": torch.ones(1), "position_ids": torch.arange(4)}


def write_shards(folder: Path, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    places = {}
    for number, names in enumerate((["a.weight", "b.bias"], ["a.bias", "b.weight", "position_ids"])):
        file = f"{stem}-{number}-of-2{suffix}"
        part = {name: STATE[name] for name in names}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write(folder: Path, layout: str) -> None:
    {
        "transformers": lambda: save_file(STATE, folder / "model.safetensors"),
        "older": lambda: torch.save(STATE, folder / "pytorch_model.bin"),
        "shards": lambda: write_shards(folder, ".safetensors"),
        "older shards": lambda: write_shards(folder, ".bin"),
        "open_clip": lambda: save_file(STATE, folder / "open_clip_model.safetensors"),
        "older open_clip": lambda: torch.save(STATE, folder / "open_clip_pytorch_model.bin"),
    }[layout]()
    name = "open_clip_config.json" if "open_clip" in layout else "config.json"
    (folder / name).write_text(json.dumps({"layout": layout}))


@pytest.mark.parametrize("layout", ["transformers", "older", "shards", "older shards", "open_clip", "older open_clip"])
def test_every_layout_of_a_folder(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    source = Source.open(tmp_path)
    assert source.settings == {"layout": layout} and source.folder == tmp_path and source.preprocessing == {}
    assert set(source.tensors) == set(STATE) and source.take("a.weight").dtype == torch.float32
    assert source.take("position_ids").tolist() == [0, 1, 2, 3]
    assert len(source.sha256) == 64 and source.sha256 == Source.open(tmp_path).sha256
    assert ("shards" in layout) != (source.sha256 == sha256(source.path))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    assert Source.open(tmp_path).preprocessing == {"image_mean": [0.5]}


def test_transformers_weights_come_with_their_own_settings(tmp_path: Path) -> None:
    """Folders of the hub hold both."""
    write(tmp_path, "open_clip")
    write(tmp_path, "transformers")
    source = Source.open(tmp_path)
    assert (source.path.name, source.settings) == ("model.safetensors", {"layout": "transformers"})


@pytest.mark.parametrize("older", [False, True])
def test_authors_files_hold_settings_as_objects(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "ALBEF.pth"
    content = {"model": {f"module.{name}": tensor for name, tensor in STATE.items()}, "epoch": 29,
               "config": argparse.Namespace(out=Path("x"), lr=1e-4), "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, path, _use_new_zipfile_serialization=not older)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    source = Source.open(path)
    assert source.settings == {} and source.folder is None and set(source.tensors) == set(STATE)
    for name, tensor in STATE.items():
        torch.testing.assert_close(source.tensors[name], tensor)


def test_what_is_used_and_what_is_not(tmp_path: Path) -> None:
    write(tmp_path, "transformers")
    source = Source.open(tmp_path)
    source.rename(lambda name: f"c.{name}")
    state = source.layer("ours", "c.a", "c.b")
    assert state["ours.weight"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]] and state["ours.bias"].tolist() == [1] * 3
    assert source.used == {"c.a.weight", "c.a.bias", "c.b.weight", "c.b.bias"} and source.unused == ["c.position_ids"]
    assert source.has("c.a.bias") and not source.has("a.bias")
    with pytest.raises(UserError, match=r"model.safetensors holds no d.weight"):
        source.layer("ours", "c.a", "d")


def test_queries_keys_and_values_in_one_matrix(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"blocks.0.qkv.weight": torch.arange(12.0).view(6, 2), "blocks.0.qkv.bias": torch.arange(6.0),
                "blocks.10.x": torch.ones(1), "blocks.x": torch.ones(1)}, path)
    source = Source.open(path)
    state = source.fused("block.attention", "blocks.0.qkv.")
    assert state["block.attention.query.weight"].tolist() == [[0, 1], [2, 3]]
    assert state["block.attention.key_value.weight"].tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert state["block.attention.query.bias"].tolist() == [0, 1]
    assert state["block.attention.key_value.bias"].tolist() == [2, 3, 4, 5]
    assert source.layers("blocks.") == 11 and source.layers("nothing.") == 0


@pytest.mark.parametrize(("content", "message"), [
    ({}, "names no files"), ([], "names no files"), ({"weight_map": {"a": "../x.safetensors"}}, "names no files"),
    ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors could not be read"),
])
def test_a_damaged_index_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_state(path)


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights: expected one of model.safetensors"):
        Source.open(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Source.open(tmp_path / "none")
    write(tmp_path, "transformers")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no names"):
        Source.open(tmp_path)
    (tmp_path / "config.json").unlink()
    assert Source.open(tmp_path).settings == {}
