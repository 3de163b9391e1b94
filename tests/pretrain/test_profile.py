"""The profile of a few steps, and TensorBoard's copy of the metrics."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opt.config import UserError
from pretrain import profile
from pretrain.profile import Profile
from pretrain.tensorboard import TensorBoard


def steps(folder: Path, recorded: int, taken: int) -> None:
    with Profile(folder, recorded) as profiled:
        for _ in range(taken):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profiled.step()


def products(folder: Path) -> int:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def test_so_many_steps_are_traced_after_the_first_three(tmp_path: Path) -> None:
    steps(tmp_path / "profile", 2, 9)
    assert products(tmp_path / "profile") == 2
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace.json", "table.txt"}


def test_a_run_that_ends_sooner_leaves_what_it_came_to(tmp_path: Path) -> None:
    steps(tmp_path / "profile", 50, 5)
    assert products(tmp_path / "profile") == 2
    steps(tmp_path / "nothing", 50, 2)
    assert not list((tmp_path / "nothing").iterdir())


def test_other_processes_trace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "rank", lambda: 1)
    steps(tmp_path / "profile", 1, 6)
    assert not (tmp_path / "profile").exists()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_lines_and_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        board.append({"step": step, "loss": step / 2, "losses": {"mlm": 0.5}, "gradient_norm": None})
    board.append({"step": 3, "validation": {"loss": 9.0, "losses": {"mlm": 8.0}}})
    board._writer.close()
    board = TensorBoard(tmp_path, 2)
    board.append({"step": 3, "loss": 7.0})
    board._writer.close()
    found = curves(tmp_path)
    assert found["loss"] == [(1, 0.5), (2, 1.0), (3, 7.0)] and found["losses/mlm"] == [(1, 0.5), (2, 0.5)]
    assert "gradient_norm" not in found and "step" not in found
    assert found.get("validation/loss", []) == []


def test_without_tensorboard_the_option_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install .*\[tensorboard\]"):
        TensorBoard(tmp_path, 0)
