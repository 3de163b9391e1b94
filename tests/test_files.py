"""Atomic files are complete or absent; progress says where it stands."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from opt import progress as progress_module
from opt.files import make_folder, mend_folder, open_atomic, replace_folder, sha256, write_atomic
from opt.progress import progress


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "data.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]


def test_open_atomic_is_invisible_until_the_end(tmp_path: Path):
    path = tmp_path / "text.txt"
    with open_atomic(path, "w") as file:
        file.write("größer\n")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "größer\n"


def test_an_error_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "data.bin"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError), open_atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_named_as_the_caller_knows_it(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "file"):
        with pytest.raises(OSError) as refused:
            write_atomic(path, b"")
        assert refused.value.filename == str(path) and ".tmp" not in str(refused.value)


def test_a_folder_that_cannot_be_written_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er").is_dir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError) as refused:
        make_folder(tmp_path)
    assert refused.value.filename == str(tmp_path)


def test_sha256(tmp_path: Path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_progress_prints_sparse_plain_lines_without_a_terminal(monkeypatch, capsys):
    seconds = iter(range(0, 10_000, 4))  # every look at the clock is 4 s later
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(seconds)))
    with progress("extract", total=12, done=2, unit="images") as bar:
        for _ in range(10):
            bar.advance(note="1 failed")
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 10
    assert all(line.startswith("extract: ") and line.endswith("1 failed") for line in lines)
    assert "left" in lines[0] and lines[-1].startswith("extract: 12/12 images") and "took" in lines[-1]


def test_progress_rate_leaves_out_what_an_earlier_run_did(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("train", total=100, done=50) as bar:
        now[0] = 5.0
        bar.advance(25)
        assert bar.status() == "75/100, 5.0/s, 0:05 left"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("extract", total=2) as bar:
        bar.advance(2, note="[0 failed]")
        print("a line between")
    sys.stdout.flush()
    shown = capsys.readouterr()
    assert "2/2" in shown.err and "[0 failed]" in shown.err
    assert "a line between" in shown.out + shown.err


@pytest.mark.parametrize("moment", range(3))
def test_a_folder_is_replaced_by_a_whole_one_or_stands_as_it_was(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of its renames and removals, the folder is there after mending: the old one or the new one."""
    for name, content in (("best", "old"), (".best.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
    calls = iter(range(10))

    def until(self: Path, target: Path) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return Path(os.rename(self, target) or target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", until)
        try:
            replace_folder(tmp_path / ".best.tmp", tmp_path / "best")
        except KeyboardInterrupt:
            assert moment < 2
    mend_folder(tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text() == ("new" if moment == 2 else "old")
    assert not (tmp_path / ".best.old").exists()
