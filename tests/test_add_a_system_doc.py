"""docs/add-a-system.md: its blocks are a system. In a copy of the repository it passes what every system must, learns
by the page's commands, and each mistake that the page names fails the test that it names."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opt import cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/add-a-system.md").read_text()
SMALLER = {"--train": "48", "--test": "4", "--loop.steps": "60", "--loop.batch-tokens": "2048",
           "runs/siglip/model": "runs/shards/train"}
"""Word by the word before it; so few steps are judged by the scenes they saw."""
FEWEST = 8
"""Rows of a batch at the least."""
ONLY = """import os
import shrunken
shrunken.EVERY = [preset for preset in shrunken.EVERY if preset.partition(".")[0] in os.environ["SYSTEMS"].split()]
"""


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def file_of(part: str) -> str:
    """A part's Python blocks, one behind the other."""
    found = [block.strip("\n") for block in blocks("python", part)]
    return found[0] + "".join(("\n\n" if block[0] == " " else "\n\n\n") + block for block in found[1:]) + "\n"


SYSTEM, OWN_TEST = map(file_of, PAGE.split("## A test of its own"))
COMMANDS = [shlex.split(line)[3:] for line in blocks("sh")[0].strip().splitlines()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the page's two files; SYSTEMS in the environment says which systems its tests look at."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("opt", "pretrain", "eval", "feature_extract", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "opt/systems/siglip.py").write_text(SYSTEM)
    (folder / "tests/systems/test_siglip.py").write_text(OWN_TEST)
    (folder / "tests/conftest.py").write_text(ONLY)
    return folder


def python(folder: Path, *words: str, systems: str = "siglip") -> subprocess.CompletedProcess[str]:
    """`python -m ...` in that folder, whose packages it imports."""
    environment = os.environ | {"PYTHONPATH": str(folder), "SYSTEMS": systems}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)


def outcomes(folder: Path, *words: str, systems: str = "siglip") -> dict[str, set[str]]:
    """By outcome, the tests of systems/ in that copy: `test[preset]`."""
    answer = python(folder, "pytest", "-rA", "-p", "no:cacheprovider", *words, systems=systems)
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) tests/systems/\w+\.py::(\S+)", answer.stdout, flags=re.M):
        found[outcome].add(test)
    return found


def test_it_passes_what_every_system_must_and_its_own_test(copy: Path) -> None:
    found = outcomes(copy, "tests/systems/test_every_system.py", "tests/systems/test_siglip.py")
    assert not found["FAILED"] and not found["ERROR"]
    rows = re.findall(r"^\| (`test_.*?) \|", PAGE, flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for preset in ("tiny", "trimodal"):
        passed = {re.split(r"[\[-]", test)[0] for test in found["PASSED"] if f"siglip.{preset}" in test}
        assert passed == named
    assert any("[" not in test for test in found["PASSED"])


def test_its_files_are_clean(copy: Path) -> None:
    answer = python(copy, "ruff", "check", "--no-cache", "opt/systems/siglip.py", "tests/systems/test_siglip.py")
    assert answer.returncode == 0, answer.stdout


def test_its_commands_train_a_model_that_sees(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in COMMANDS:
        smaller = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if words[0] in ("scenes", "extract"):
            assert cli.main(smaller) == 0, words
        else:
            absolute = [str(tmp_path / word) if word.startswith("runs/") else word for word in smaller]
            answer = python(copy, "opt", *absolute)
            assert answer.returncode == 0, answer.stderr
    lines = (tmp_path / "runs/siglip/metrics.jsonl").read_text().splitlines()
    blind = math.log(FEWEST) + (FEWEST - 1) * math.log(FEWEST / (FEWEST - 1))
    assert json.loads(lines[0])["loss"] > blind > json.loads(lines[-1])["loss"]
    r1 = re.search(r"text_to_image\.r1 +([\d.]+) %.*? ([\d.]+) % +\d+$", answer.stdout, flags=re.M)
    assert r1 and float(r1[1]) > 5 * float(r1[2]), answer.stdout


TWO, LESS, GRADIENT, BACK, SAME, HEART = (
    "two_processes_are_one", "a_modality_that_nobody_has_leaves_the_loss_finite",
    "every_trained_parameter_gets_a_gradient", "it_comes_back_from_its_training_state",
    "its_exported_folder_is_the_same_model", "it_learns_a_batch_by_heart",
)
MISTAKES: dict[str, tuple[str, list[tuple[str, str]], set[str]]] = {
    "mean": ("a mean", [("logits_BK)).sum()", "logits_BK)).mean()")], {TWO, LESS}),
    "own": ("own keys only", [("gather_rows(second_BE, capacity)", "second_BE"), ("rank() * capacity + ", ""),
                              ("gather_rows(picture_B, capacity, filler=NO_PICTURE)", "picture_B")], {TWO}),
    "offset": ("a place without the process's offset", [("rank() * capacity + ", "")], {TWO}),
    "attribute": ("a counter in a plain attribute",
                  [("terms = {}\n", "terms, self.seen = {}, getattr(self, 'seen', 0.0) + 0.1\n"),
                   ("self.bias, batch", "self.bias + self.seen, batch")], {BACK, SAME}),
    "unused": ("a part that is built and not used", [("if config.hears:", "if True:")], {GRADIENT, LESS, BACK}),
    "detached": ("a `detach` too many", [("gather_rows(second_BE,", "gather_rows(second_BE.detach(),")],
                 {GRADIENT, LESS, BACK}),
    "blind": ("the same vector", [("gather_rows(second_BE,", "gather_rows(second_BE.mean(0).expand_as(second_BE),")],
              set()),
}
"""By a name: what the page calls it, what it makes of the file, and the tests that fail."""


@pytest.mark.slow
def test_each_mistake_fails_the_tests_that_the_page_names(copy: Path, tmp_path: Path) -> None:
    for name, (said, changes, _) in MISTAKES.items():
        assert said in PAGE
        wrong = SYSTEM.replace('name = "siglip"', f'name = "{name}"')
        for old, new in changes:
            assert wrong.count(old) == 1, old
            wrong = wrong.replace(old, new)
        (copy / f"opt/systems/{name}.py").write_text(wrong)
    alone = {"unused", "detached", "blind"}  # a parameter without a gradient would stop two processes for all
    every = "tests/systems/test_every_system.py"
    failed = outcomes(copy, every, "-k", "tiny", systems=" ".join(MISTAKES.keys() - alone))["FAILED"]
    failed |= outcomes(copy, every, "-k", f"tiny and not {TWO}", systems=" ".join(alone))["FAILED"]
    for name, (_, _, tests) in MISTAKES.items():
        found = {re.split(r"[\[-]", test)[0].removeprefix("test_") for test in failed if f"[{name}.tiny" in test}
        assert found == tests, name


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.S)):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:tests|pretrain|opt)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists() or path in ("opt/systems/NAME.py", "tests/systems/test_siglip.py"), path
