"""Tables of figures for the page of one run, with the paper's figures as grey rows, and differences in points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval.page.dots import difference, whisker
from eval.page.markup import Markup, element, joined, table
from eval.page.reported import MARK, Reported, reported
from eval.page.words import words
from eval.result import Metric, percent_range


def protocol(metric: Metric) -> str:
    """How a figure was measured, in a line: for hovering and for notes."""
    parts = [metric.protocol, metric.candidates, metric.normaliser, metric.note,
             metric.rerank_k and f"{metric.rerank_k} candidates scored again",
             metric.chance_method and f"chance: {metric.chance_method}"]  # fmt: skip
    return "; ".join(part for part in parts if part)


def measured_by(metrics: Sequence[Metric], notes: Sequence[str]) -> Markup | None:
    """How the figures of a table were measured: protocols, normalisers, notes and chance, each once."""
    said = {
        "Protocol": [metric.protocol for metric in metrics],
        "Normalised": [metric.normaliser for metric in metrics],
        "Notes": notes,
        "Chance": [metric.chance_method for metric in metrics],
    }
    once = {kind: " · ".join(dict.fromkeys(filter(None, texts))) for kind, texts in said.items()}
    parts = [[element("b", kind), f" {text}. "] for kind, text in once.items() if text]
    return element("p", parts, class_="small") if parts else None


def shared_notes(metrics: Sequence[Metric]) -> list[str]:
    """Parts of notes that at least half of the figures share, such as how text was decoded; others stay with theirs."""
    parts = Counter(part for metric in metrics for part in metric.note.split("; ") if part)
    return [part for part, count in parts.items() if 2 * count >= len(metrics)]


def figures(metrics: Sequence[Metric], labels: Mapping[str, str] | None = None) -> Markup:
    """One row a metric: words, value, bar, interval, chance, n; the paper's figure of the same name beneath in grey."""
    tables = reported([metric.name for metric in metrics])
    rows = []
    for metric in metrics:
        rows.append(element(
            "tr",
            element("td", (labels or {}).get(metric.name, words(metric)), title=protocol(metric) or None),
            element("td", metric.shown(metric.value), class_="value"),
            element("td", _bar(metric)),
            element("td", metric.shown_interval),
            element("td", metric.shown(metric.chance), title=metric.chance_method or None),
            element("td", f"{metric.n:,}"),
        ))  # fmt: skip
        rows += [_grey(metric, one) for one in tables if metric.name in one.figures]
    drawn = table(["", "", "", "95 % interval", "chance", "n"], rows)
    return joined([drawn, measured_by(metrics, shared_notes(metrics)), grey_notes(tables)])


def _bar(metric: Metric) -> Markup | None:
    """The value on a line from nought to 1; a score has no such line."""
    if metric.unit != "share":
        return None
    return whisker(metric.value, metric.interval, metric.chance, max(1.0, metric.value))


def _grey(metric: Metric, one: Reported) -> Markup:
    value = one.figures[metric.name]
    return element(
        "tr",
        element("td", one.name, element("span", MARK, class_="data")),
        element("td", metric.shown(value)),
        element("td", whisker(value, None, None, max(1.0, metric.value, value))),
        element("td", colspan=3),
        class_="reported",
        title=one.about,
    )


def grey_notes(tables: Sequence[Reported]) -> Markup | None:
    """What the grey figures are, beneath a table that has some."""
    if not tables:
        return None
    said = dict.fromkeys(f"{one.name}: {one.data}; {one.protocol}." for one in tables)
    return element("p", "Grey: reported by the paper on other data, in its own protocol, and compared with nothing "
                   "here. ", " ".join(said), class_="small")  # fmt: skip


def gains(metrics: Sequence[Metric]) -> Markup:
    """One row a paired difference, in points: words, value, dot on a line with nought in the middle, interval."""
    reach = max([abs(end) for gain in metrics for end in gain.interval or ()], default=1.0) or 1.0
    rows = [
        element(
            "tr",
            element("td", words(gain)),
            element("td", points(gain.value), class_="value"),
            element("td", difference(gain.value, gain.interval or (gain.value, gain.value), reach)),
            element("td", percent_range(gain.interval)),
        )
        for gain in metrics
    ]
    return table(["", "", "", "95 % interval, paired"], rows)


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}"


def section(title: str, hint: str | None, *parts: Any) -> Markup:
    """A heading, a grey sentence and what follows."""
    return joined([element("h2", title), element("p", hint, class_="hint") if hint else None, list(parts)])
