"""Training states: complete or absent, the newest whole one found, damage named; a full disk loses nothing."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from opt.config import UserError
from opt.lock import remove_unfinished
from pretrain.state import FILES, States, lacking, load_state, newest_state


def state(value: float) -> dict:
    return {"weights": torch.full((1000,), value), "step": torch.tensor(int(value))}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    states = States(folder, keep)
    for step in steps:
        states.save(step, lambda step=step: state(step))
    states.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000010"]


def test_what_changes_after_saving_is_not_in_the_state(tmp_path: Path) -> None:
    states, content = States(tmp_path, 1), state(3)
    states.save(3, lambda: content)
    content["weights"].fill_(7.0)
    states.join()
    loaded = state(0)
    load_state(tmp_path / "step-00000003", loaded)
    assert loaded["weights"].tolist() == [3.0] * 1000


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "unlisted", "no metadata"])
def test_a_state_that_is_not_whole_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    newest = newest_state(tmp_path)
    assert newest is not None and newest.name == "step-00000002"
    (path,) = newest.glob("*.distcp")
    if damage == "cut":
        os.truncate(path, 100)
    elif damage == "emptied":
        os.truncate(path, 0)
    else:
        {"gone": path, "unlisted": newest / FILES, "no metadata": newest / ".metadata"}[damage].unlink()
    found = newest_state(tmp_path)
    assert found is not None and found.name == "step-00000001" and lacking(newest) is not None
    loaded = state(0)
    load_state(found, loaded)
    assert loaded["weights"].tolist() == [1.0] * 1000


def test_what_is_not_whole_never_costs_what_is(tmp_path: Path) -> None:
    """A copy that was cut short, of a step far ahead, and folders of other names."""
    save(tmp_path, 8, keep=1)
    for name in ("step-00000010", "step-00000004-copy", "step-00000000.note"):
        (tmp_path / name).mkdir()
    save(tmp_path, 9, keep=1)
    newest = newest_state(tmp_path)
    assert newest is not None and newest.name == "step-00000009"
    assert names(tmp_path) == ["step-00000000.note", "step-00000004-copy", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "{}", "not JSON", '{".metadata": {"bytes": "many"}}'])
def test_a_list_of_files_that_is_none_is_passed_over(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / FILES).write_text(content)
    found = newest_state(tmp_path)
    assert found is not None and found.name == "step-00000001"


def test_a_state_of_other_sizes_is_a_sentence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match="does not fit this model"):
        load_state(tmp_path / "step-00000001", {"weights": torch.zeros(7), "step": torch.tensor(0)})


def test_bytes_that_changed_are_named_with_the_way_out(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    newest = newest_state(tmp_path)
    assert newest is not None
    (path,) = newest.glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000002 is damaged.*delete that folder.*step-00000001"):
        load_state(newest, state(0))
    shutil.rmtree(newest)
    older = newest_state(tmp_path)
    assert older is not None and older.name == "step-00000001"


def test_a_full_disk_keeps_the_older_state_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000009.tmp").mkdir()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["step-00000001"]
