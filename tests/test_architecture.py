"""What holds for the repository as a whole: which way imports point, and what may be tracked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_FILE = 1_500_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(" + "|".join(["work", "root", "home/\\w+", "Users/\\w+", "tmp/boot"]) + r")/\w")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every tracked file that is still there."""
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in answer.stdout.split("\0") if (ROOT / name).is_file()]


def test_imports_point_one_way():
    program = Path(sys.executable).with_name("lint-imports")
    answer = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_nobody_hides_the_builtin_eval(tracked: list[Path]):
    """`import eval` binds the name of a builtin; `from eval.x import y` does not."""
    for path in (path for path in tracked if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bound = [name.asname or name.name.split(".")[0] for name in node.names]
                assert "eval" not in bound, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_paths_of_one_machine(tracked: list[Path]):
    for path in tracked:
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        found = MACHINE_PATH.search(content.decode("utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} holds {found and found.group(0)}..."


def test_no_large_files_but_the_embedded_networks(tracked: list[Path]):
    weights = ROOT / "feature_extract" / "tiny" / "weights"
    for path in tracked:
        assert path.parent == weights or path.stat().st_size <= LARGEST_FILE, path.relative_to(ROOT)


def test_folders_of_tests_are_no_packages_but_the_one_that_others_could_hide(tracked: list[Path]):
    found = [path for path in tracked if path.name == "__init__.py" and (ROOT / "tests") in path.parents]
    assert found == [ROOT / "tests" / "__init__.py"]
