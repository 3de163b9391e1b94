"""How to get the figures again: commands, versions, hashes, settings; where the time went; what was not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eval.page.markup import Markup, element, joined, table
from eval.page.run import Run
from eval.page.words import OPTIONAL, TITLES
from eval.result import Provenance, Result

BLOCKS = {
    "origins": "Corpora of the test records", "trained_on": "What the model was trained on",
    "extractors": "Extractors of the features", "packages": "Packages",
}  # fmt: skip
"""Fields of a provenance that take more than a cell."""
ELSEWHERE = {"command", "tiny_networks", *BLOCKS}
"""Fields that have a place of their own; all others are columns."""
HEADS = {
    "model_sha256": "model", "split_sha256": "shards", "split": "frozen split", "split_keys_sha256": "keys",
    "code_version": "code", "text_limit": "longest text",
}  # fmt: skip
"""What columns are called where it is not the field's name."""
HASH = 12


def columns(results: Sequence[Result]) -> list[str]:
    """Fields of the results' provenance that at least one of them fills."""
    names = [entry.name for entry in dataclasses.fields(Provenance) if entry.name not in ELSEWHERE]
    return [name for name in names if any(getattr(result.provenance, name) not in (None, "", (), {})
                                          for result in results)]  # fmt: skip


def cell(value: Any, name: str) -> Markup:
    """A field of a provenance: hashes shortened, with the whole on hovering."""
    if value in (None, ""):
        return element("td", "–", class_="none")
    if name.endswith("sha256"):
        return element("td", element("code", value[:HASH]), title=value)
    return element("td", f"{value:,}" if isinstance(value, int) else value)


def head(name: str) -> str:
    """A field's name as a column's head."""
    return HEADS.get(name, name)


def commands(run: Run) -> Markup | None:
    """A row a result: its command and everything that it was measured with."""
    results = list(run.results.values())
    if not results:
        return None
    names = columns(results)
    rows = [
        element(
            "tr",
            element("td", TITLES.get(task, task)),
            element("td", element("code", result.provenance.command), class_="words"),
            element("td", f"{result.seconds:.1f} s"),
            [cell(getattr(result.provenance, name), name) for name in names],
        )
        for task, result in run.results.items()
    ]
    return table(["", "command", "took", *map(head, names)], rows)


def provenance(run: Run) -> Markup:
    """The commands of one run, its settings, extractors and times."""
    times = [
        element("tr", element("td", name), element("td", f"{value:,.0f} s")) for name, value in run.seconds.items()
    ]
    return joined([
        element("h2", "How to get these figures again"),
        commands(run),
        blocks(run),
        element("details", element("summary", "Where the time went"), table(["", "seconds"], times)) if times else None,
    ])  # fmt: skip


def blocks(run: Run) -> list[Markup]:
    """The settings of a run and the long fields of its first result, folded."""
    found = {"Settings of the run": run.config}
    first = next(iter(run.results.values()), None)
    if first is not None:
        values = dataclasses.asdict(first.provenance)
        found |= {title: values[name] for name, title in BLOCKS.items()}
    return [element("details", element("summary", title), element("pre", element("code", pretty(value))))
            for title, value in found.items() if value]  # fmt: skip


def pretty(value: Any, indent: str = "") -> str:
    """Nested settings, one a line; an entry of a list of settings begins with a dash."""
    lines = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            nested = isinstance(inner, Mapping) or _settings(inner)
            lines.append(f"{indent}{key}:" if nested else f"{indent}{key}: {inner}")
            lines += [pretty(inner, indent + "  ")] if nested and inner else []
    elif _settings(value):
        for inner in value:
            lines.append(f"{indent}- {pretty(inner, indent + '  ').lstrip()}")
    else:
        lines.append(f"{indent}{value}")
    return "\n".join(lines)


def _settings(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value)


def missing(run: Run) -> list[tuple[str, str]]:
    """What could not be measured, and why. (Only a model tuned for questions has answers.)"""
    absent = [(name, reason) for result in run.results.values() for name, reason in result.absent.items()]
    return absent + [
        (task, "this evaluation was not run") for task in TITLES if task not in run.results and task not in OPTIONAL
    ]


def not_measured(run: Run) -> Markup | None:
    """The list of what is missing from a run's page."""
    entries = [element("li", element("code", name), f": {reason}") for name, reason in missing(run)]
    return joined([element("h2", "Not measured"), element("ul", entries, class_="absent")]) if entries else None
