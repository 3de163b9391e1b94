"""docs/evaluation.md: its commands exist; it explains every protocol and every field that the code names."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from eval.protocols import PROTOCOLS
from eval.result import Metric, Provenance
from opt import cli
from opt.history import Regime

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in block.strip().splitlines()
            if line.startswith("opt ")]
CODE = "\n".join(path.read_text() for path in sorted((ROOT / "eval").rglob("*.py")))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_options_that_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    verb = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.VERBS)
    cli._parse(cli._function(cli.VERBS[verb]), f"opt {verb}", words[len(verb.split()):])


def test_every_protocol_that_the_code_names_is_explained() -> None:
    named = set(re.findall(r"""["']?protocol["']?\]?\s*[=:]\s*f?"([\w./{}-]+/[\w./{}-]+)\"""", CODE))
    assert len(named) > 10
    for name in named:
        pattern = re.escape(name)
        for field in re.findall(r"\{.*?\}", name):
            pattern = pattern.replace(re.escape(field), r"[\w.-]+")
        assert re.search(f"`{pattern}`", PAGE), name


def test_every_way_to_search_regime_and_field_is_explained() -> None:
    for name in (*PROTOCOLS, *get_args(Regime)):
        assert f"| `{name}` |" in PAGE, name
    for protocol in PROTOCOLS.values():
        assert protocol.command.partition(" --out")[0].partition(" SHARDS")[0] in PAGE
    fields = {field.name for field in (*dataclasses.fields(Provenance), *dataclasses.fields(Metric))}
    plain = {"name", "value", "system", "samples", "interval", "chance", "modalities", "protocol"}
    assert [name for name in sorted(fields - plain) if f"`{name}`" not in PAGE] == []


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:tests|eval|opt)/[\w/]+\.(?:py|json))`", PAGE):
        assert (ROOT / path).exists(), path
