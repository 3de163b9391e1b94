"""The command line: verbs found, options parsed, mistakes answered in one line."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pytest
from tyro.conf import Positional

from opt import cli
from opt.config import UserError

Model = TypeVar("Model")
calls: list[object] = []


@dataclass
class ToyConfig:
    """What the toy verb does."""

    shards: Path
    """Folder of shards."""
    batch_tokens: int = 64
    """Tokens in a batch."""
    dry_run: bool = False
    """Say what would be done, and stop."""


@dataclass
class Small:
    width: int = 8
    """Width of the small model."""


@dataclass
class Wide:
    depth: int = 99
    """Depth of the wide model."""


@dataclass
class TrainConfig(Generic[Model]):
    system: Positional[str]
    """Which system, for example small."""
    model: Model
    """Its settings."""
    steps: int = 10
    """Steps in all."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each objective."""

    @classmethod
    def prepare(cls, argv: list[str]) -> tuple[type, "TrainConfig | None"]:
        kind: type = {"small": Small, "wide": Wide}[argv[0]]
        return cls[kind], cls(argv[0], kind(), steps=20)  # type: ignore[index]


def toy(config: ToyConfig) -> None:
    """Do the toy thing.

    opt toy --shards runs/x
    """
    calls.append(config)


def train(config: TrainConfig) -> None:
    """Train a toy."""
    calls.append(config)


def mistake(config: ToyConfig) -> None:
    """Fail as a user would."""
    raise UserError(f"{config.shards} holds no shards; make some with `opt extract`")


def interrupted(config: ToyConfig) -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


def write(config: ToyConfig) -> None:
    """Write where it may not be possible."""
    if config.dry_run:
        raise OSError(28, "No space left on device")
    (config.shards / "file").write_text("x")


def needy(config: ToyConfig) -> None:
    """Never called."""


@pytest.fixture(autouse=True)
def toy_verbs(monkeypatch):
    """The functions of this file as verbs, under a name that the command line can import."""
    monkeypatch.setitem(sys.modules, "toy_verbs", sys.modules[__name__])
    for name in ("toy", "train", "mistake", "interrupted", "write"):
        monkeypatch.setitem(cli.VERBS, name, cli.Verb(f"toy_verbs:{name}", f"the verb {name}"))
    monkeypatch.setitem(cli.VERBS, "group toy", cli.Verb("toy_verbs:toy", "the toy in a group"))
    calls.clear()


def test_options_become_the_dataclass():
    assert cli.main(["toy", "--shards", "a/b", "--batch-tokens", "7", "--dry-run"]) == 0
    assert cli.main(["group", "toy", "--shards", "c"]) == 0
    assert calls == [ToyConfig(Path("a/b"), 7, True), ToyConfig(Path("c"))]


def test_prepare_gives_the_concrete_generic_type_and_its_defaults():
    assert cli.main(["train", "small", "--model.width", "256"]) == 0
    assert cli.main(["train", "wide", "--model.depth", "3", "--steps", "4", "--weights", "mlm", "0.5"]) == 0
    assert calls == [
        TrainConfig("small", Small(256), 20),
        TrainConfig("wide", Wide(3), 4, {"mlm": 0.5}),
    ]
    assert cli.main(["train", "wide", "--model.width", "3"]) == 2


def test_help_of_a_verb_shows_the_example_and_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["toy", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: opt toy" in shown and "opt toy --shards runs/x" in shown
    assert "--batch-tokens INT" in shown and "Tokens in a batch." in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_help_of_a_prepared_verb_shows_the_chosen_settings(capsys):
    assert cli.main(["train", "wide", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Which system" in shown and "--model.depth" in shown and "--model.width" not in shown


@pytest.mark.parametrize("argv", [[], ["--help"], ["eval"], ["eval", "--help"], ["shards", "-h"]])
def test_overview_lists_verbs_with_summaries(argv, capsys):
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    group = argv[0] if argv and argv[0] != "--help" else ""
    for name, verb in cli.VERBS.items():
        assert (f"  {name} " in shown and verb.summary in shown) == name.startswith(group)


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["scnes", "--out", "x"], "opt scenes"),
        (["eval", "retrival"], "opt eval retrieval"),
        (["shard", "verify"], "opt shards"),
    ],
)
def test_unknown_verb_names_the_nearest(argv, nearest, capsys):
    assert cli.main(argv) == 2
    assert f"did you mean `{nearest}`?" in capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys):
    assert cli.main(["mistake", "--shards", "empty"]) == 2
    expected = "opt mistake: error: empty holds no shards; make some with `opt extract`\n"
    assert capsys.readouterr().err == expected


def test_wrong_options_return_2(capsys):
    assert cli.main(["toy", "--shrads", "x"]) == 2
    assert "--shards" in capsys.readouterr().err


def test_what_the_file_system_refuses_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder, said in ((tmp_path / "file", "Not a directory"), (tmp_path / "none", "No such file or directory")):
        assert cli.main(["write", "--shards", str(folder)]) == 2
        assert capsys.readouterr().err == f"opt write: error: {folder}/file: {said}\n"
    assert cli.main(["write", "--shards", "x", "--dry-run"]) == 2
    assert "No space left on device; make room and run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--shards", ""], ["--shards="], ["", "--shards", "x"]])
def test_an_empty_word_is_most_likely_an_unset_variable(argv, capsys):
    assert cli.main(["toy", *argv]) == 2
    assert "empty" in capsys.readouterr().err and not calls


def test_interruption_says_how_to_go_on(capsys):
    assert cli.main(["interrupted", "--shards", "x"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_before_the_work_begins_says_run_me_again(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "told.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})")  # while it is imported
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "slow", cli.Verb("told:slow", "is told to stop"))
    before = signal.getsignal(number)
    assert cli.main(["slow"]) == 75 and signal.getsignal(number) == before
    assert "run the same command again" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "needy", cli.Verb("needs_more:needy", "cannot be imported"))
    assert cli.main(["needy"]) == 2
    assert "needs the package 'not_there_at_all'" in capsys.readouterr().err


def test_overview_does_not_import_torch():
    code = (
        "import sys; from opt.cli import main; main(['--help']); sys.exit(bool({'torch', 'tyro'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    (tmp_path / "chatty.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    n: int = 200000\n"
        "def chatty(config: C) -> None:\n    for i in range(config.n): print('a line of text', i)\n"
    )
    code = (
        "import sys; from opt import cli; cli.VERBS['chatty'] = cli.Verb('chatty:chatty', '')\n"
        "sys.exit(cli.main(['chatty']))"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_exists_and_takes_one_dataclass(name):
    assert cli.main([*name.split(), "--help"]) == 0


@pytest.mark.parametrize(("redirect", "environment"), [(">&-", {}), ("", {"PYTHONIOENCODING": "ascii"})])
def test_no_output_and_poor_output_end_no_verb(tmp_path, redirect, environment):
    (tmp_path / "über.txt").write_text("ein Kreis\n")
    command = (f"{sys.executable} -m opt extract text {tmp_path}/über.txt --out {tmp_path}/aus_über --workers 0 "
               f"--regions none --audio none --codes none {redirect}")
    ran = subprocess.run(command, shell=True, env={**os.environ, **environment}, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    assert (tmp_path / "aus_über" / "manifest.json").exists() and b"Traceback" not in ran.stderr
