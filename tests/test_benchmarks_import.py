"""Every script in benchmarks/ finds what it imports, and hides no package: nobody runs them all after each change."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_has_no_name_of_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's folder is first on its path: open_clip.py would be imported for the package of that name."""
    own = {BENCHMARKS, BENCHMARKS.parent, BENCHMARKS.parent / "tests"}
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() not in own])
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.util.find_spec(name) is None
