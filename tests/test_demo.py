"""The demo is a pipeline of verbs that exist, and stops where one fails."""

from pathlib import Path

import pytest

from opt import cli, demo
from opt.config import UserError


def test_every_stage_is_a_verb_and_dry_run_only_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo.DemoConfig(out=tmp_path / "demo", dry_run=True)
    for _, argv in demo.stages(config):
        assert argv[0] in cli.VERBS or " ".join(argv[:2]) in cli.VERBS
    demo.demo(config)
    assert capsys.readouterr().out.count("$ opt ") == len(demo.stages(config))
    assert not list(tmp_path.rglob("*.json"))


def test_a_stage_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def main(argv: list[str]) -> int:
        called.append(argv[0])
        return 2 if argv[0] == "extract" else 0

    monkeypatch.setattr(cli, "main", main)
    with pytest.raises(UserError, match="extract"):
        demo.demo(demo.DemoConfig(out=tmp_path / "demo"))
    assert called == ["scenes", "extract"]
