"""How to get the figures again: commands, versions, hashes, settings; where the time went; what was not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eval.page.markup import Markup, element, joined, table
from eval.page.run import Run
from eval.page.words import OPTIONAL, TITLES
from eval.result import Provenance, Result

ELSEWHERE = {"command", "extractors", "tiny_networks"}
"""Fields of a provenance that have a place of their own; all others are columns."""
HASH = 12


def columns(results: Sequence[Result]) -> list[str]:
    """Fields of the results' provenance that at least one of them fills."""
    names = [entry.name for entry in dataclasses.fields(Provenance) if entry.name not in ELSEWHERE]
    return [name for name in names if any(getattr(result.provenance, name) not in (None, "", (), {})
                                          for result in results)]  # fmt: skip


def cell(value: Any, name: str) -> Markup:
    """A field of a provenance: hashes shortened, with the whole on hovering."""
    if name.endswith("sha256"):
        return element("td", element("code", str(value)[:HASH]), title=value)
    if isinstance(value, Mapping):
        return element("td", ", ".join(f"{key} {inner}" for key, inner in value.items()))
    if isinstance(value, list | tuple):
        return element("td", ", ".join(map(str, value)))
    return element("td", "–" if value in (None, "") else f"{value:,}" if type(value) is int else str(value))


def head(name: str) -> str:
    """A field's name as a column's head."""
    return name.removesuffix("_sha256").removesuffix("_version").replace("_", " ")


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
    extractors = next((dict(result.provenance.extractors) for result in run.results.values()), {})
    blocks = {"Settings of the run": run.config, "Extractors of the features": extractors}
    times = [
        element("tr", element("td", name), element("td", f"{value:,.0f} s")) for name, value in run.seconds.items()
    ]
    return joined([
        element("h2", "How to get these figures again"),
        commands(run),
        [element("details", element("summary", title), element("pre", element("code", pretty(values))))
         for title, values in blocks.items() if values],
        element("details", element("summary", "Where the time went"), table(["", "seconds"], times)) if times else None,
    ])  # fmt: skip


def pretty(values: Mapping[str, Any], indent: str = "") -> str:
    """Nested settings, one a line."""
    lines = []
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        lines.append(f"{indent}{key}:" if inner else f"{indent}{key}: {value}")
        if inner:
            lines.append(pretty(value, indent + "  "))
    return "\n".join(lines)


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
