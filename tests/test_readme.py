"""The README's commands run as they stand, in a reduced size; so does its Python."""

import re
import shlex
from pathlib import Path

import pytest

from opt import cli

README = Path(__file__).parent.parent / "README.md"
SMALLER = {"--train": "24", "--test": "8", "--loop.steps": "4"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in "".join(blocks("sh")).strip().splitlines():
            words = shlex.split(line)
            assert words[:3] == ["python", "-m", "opt"]
            smaller = [SMALLER.get(before, word) for before, word in zip(words, words[1:], strict=False)][2:]
            assert cli.main(smaller) == 0, line
    return folder


def test_every_command_runs_and_ends_in_a_report(workshop: Path) -> None:
    page = (workshop / "runs/first/report.html").read_text()
    assert "retrieval" in page.lower() and "<html" in page
    assert (workshop / "runs/first/summary.json").exists()


def test_commands_that_need_the_network_or_your_files_have_options_that_exist() -> None:
    lines = "".join(blocks("console")).strip().splitlines()
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)[3:]
        name = " ".join(words[:2]) if " ".join(words[:2]) in cli.VERBS else words[0]
        config = cli._parse(cli._function(cli.VERBS[name]), f"opt {name}", words[len(name.split()) :])
        assert config.out


def test_the_python_example_runs(workshop: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(workshop)
    exec(compile(blocks("python")[0], "README", "exec"), {})
    assert len(capsys.readouterr().out.strip().splitlines()) == 3


def test_the_first_screen_names_the_two_commands_and_the_files_exist() -> None:
    text = README.read_text()
    assert "make demo" in text and "make test" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / link).exists(), link
