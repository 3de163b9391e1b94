"""Configurations come back from their file as they were; unknown keys are errors."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opt.config import UserError, from_dict, load, read_json, save, to_dict
from opt.systems.system import Sampling


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rates: tuple[float, ...] = (0.5, 1.0)


@dataclass(frozen=True)
class Outer:
    folder: Path
    inner: Inner = field(default_factory=Inner)
    weights: dict[str, float] = field(default_factory=dict)
    other: Inner | None = None
    out: Path | None = None
    size: tuple[int, int] = (8, 8)


@pytest.mark.parametrize(
    "config",
    [
        Outer(Path("shards")),
        Outer(Path("/a/b"), Inner(7, (0.1,)), {"mlm": 1.0}, Inner(9, ()), Path("runs"), (2, 3)),
    ],
)
def test_round_trip(config: Outer, tmp_path: Path):
    path = tmp_path / "config.json"
    save(config, path)
    assert load(Outer, path) == config
    assert json.loads(path.read_text()) == to_dict(config)


def test_unknown_key_names_the_key_its_place_and_the_known_ones():
    with pytest.raises(UserError, match=r"run\.inner: unknown key 'widht'; Inner knows rates, width"):
        from_dict(Outer, {"folder": "x", "inner": {"widht": 3}}, "run")


def test_missing_file_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load(Outer, tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [{"folder": 3}, {"inner": 3}, {"inner": None}, {"inner": {"width": "8"}}, {"inner": {"width": True}},
     {"inner": {"rates": [1, "x"]}}, {"inner": {"rates": 1.0}}, {"weights": []}, {"size": [8]}],
)
def test_values_of_another_type_name_their_place(change: dict):
    with pytest.raises(UserError, match=f"^here.{next(iter(change))}"):
        from_dict(Outer, {"folder": "x", **change}, "here")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}"])
def test_a_damaged_file_is_the_users_error(tmp_path: Path, content: bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        load(Outer, path)


def test_json_that_is_nested_without_end_is_a_sentence(tmp_path: Path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json is damaged"):
        read_json(tmp_path / "deep.json")


def test_a_value_that_its_class_refuses_is_named_with_its_file():
    with pytest.raises(UserError, match=r"^model/config\.json: temperature 0\.0 must"):
        from_dict(Sampling, {"temperature": 0.0}, "model/config.json")
