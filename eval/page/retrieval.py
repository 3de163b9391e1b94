"""The section on retrieval: recall by direction and by how candidates are ordered, as plot and table, then searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.page.cards import gallery, listed, worst
from eval.page.dots import Dot, Row, dot_plot
from eval.page.figures import figures, gains, grey_notes, measured_by, protocol, section, shared_notes
from eval.page.markup import Markup, element, joined, picture, table
from eval.page.reported import MARK, Reported, reported
from eval.page.run import Run
from eval.page.words import HINTS, PAPER, RECALL, TITLES, WAYS, direction, in_order, is_gain
from eval.result import Metric

DEPTHS = (1, 5, 10)

Recalls = dict[str, dict[tuple[str, int], Metric]]
"""Direction -> (way, depth) -> recall."""


def retrieval(run: Run) -> Markup | None:
    """Recall by direction, then a few searches as pictures."""
    result = run.results.get("retrieval")
    if result is None:
        return None
    recalls, others = _sorted(result.metrics)
    more = [metric for metric in others if is_gain(metric)]
    rest = [metric for metric in others if not is_gain(metric)]
    coinciding = next((metric.candidates.partition("; ")[2] for metric in result.metrics), "")
    return section(
        TITLES["retrieval"], HINTS["retrieval"],
        _plot(recalls) if recalls else None,
        _table(recalls) if recalls else None,
        element("p", f"{coinciding}, so that nobody could tell them apart.", class_="small") if coinciding else None,
        figures(rest) if rest else None,
        [element("h3", "What the recording adds to the caption, in points"), gains(more)] if more else None,
        [element("h3", "The first queries of the split and what was found for them, best first, the right one ringed"),
         gallery(run.pictures, result.examples, search, "queries")] if result.examples else None,
        worst(run.pictures, result, search, "queries"),
    )  # fmt: skip


def _sorted(metrics: Sequence[Metric]) -> tuple[Recalls, list[Metric]]:
    """Recalls at the depths of the table by direction, and all other figures."""
    recalls: Recalls = {}
    others = []
    for metric in in_order(metrics):
        found = RECALL.fullmatch(metric.name)
        if found and int(found["depth"]) in DEPTHS:
            recalls.setdefault(found["direction"], {})[found["way"], int(found["depth"])] = metric
        else:
            others.append(metric)
    return recalls, others


def _plot(recalls: Recalls) -> Markup:
    """R@1, 5 and 10 of each direction on one line, with intervals; a line for each way."""
    rows = []
    for name, found in recalls.items():
        lines = []
        for way, words in WAYS.items():
            metrics = {depth: found[way, depth] for depth in DEPTHS if (way, depth) in found}
            dots = [Dot(metric.value, metric.interval if depth == 1 else None, f"r{depth}",
                        f"{direction(name)}, {words}: R@{depth} {metric.shown(metric.value)}")
                    for depth, metric in reversed(metrics.items())]  # fmt: skip
            if dots:
                lines.append((words.removeprefix("by "), dots))
        chance = next((metric.chance for (_, depth), metric in found.items() if depth == 1), None)
        rows.append(Row(direction(name), lines if len(lines) > 1 else [("", lines[0][1])], chance))
    keys = [element("span", f"R@{depth}", class_=f"dot r{depth}") for depth in DEPTHS]
    legend = element("p", keys, " The line at R@1 is its 95 % interval, the mark ", element("span", class_="key"),
                     " chance at R@1.", class_="small legend")  # fmt: skip
    return joined([legend, dot_plot(rows, 1.0, ("0", "100 %"))])


def _table(recalls: Recalls) -> Markup:
    """A row a direction, three columns a way; the paper's figures beneath in grey."""
    ways = [way for way in WAYS if any((way, depth) in found for found in recalls.values() for depth in DEPTHS)]
    metrics = [metric for found in recalls.values() for metric in found.values()]
    tables = reported([metric.name for metric in metrics])
    rows: list[Markup] = []
    others = next((name for name in recalls if name not in PAPER), None)
    for name in recalls:
        if name == others:
            heading = element("td", "Directions that the paper does not have", colspan=3 * len(ways) + 3)
            rows.append(element("tr", heading, class_="more"))
        rows.append(_row(name, recalls[name], ways))
        rows += [_grey(name, one, ways) for one in tables if f"retrieval.{name}.r1" in one.figures]
    above = element("tr", element("th"), [element("th", WAYS[way], colspan=3, scope="colgroup") for way in ways],
                    element("th", colspan=2), class_="groups")  # fmt: skip
    heads = ["", *[f"R@{depth}" for _ in ways for depth in DEPTHS], "chance", "queries in candidates"]
    seconds = sorted({metric.rerank_k for found in recalls.values() for metric in found.values() if metric.rerank_k})
    note = seconds and element(
        "p", f"In two stages: the best {' or '.join(map(str, seconds))} by alignment are ordered again by matching. "
        "A dash: not asked for.",
        class_="small",
    )  # fmt: skip
    said = measured_by(metrics, shared_notes(metrics))
    return joined([table(heads, rows, above, "recalls"), note or None, said, grey_notes(tables)])


def _row(name: str, found: Mapping[tuple[str, int], Metric], ways: Sequence[str]) -> Markup:
    cells = []
    for way in ways:
        for depth in DEPTHS:
            metric = found.get((way, depth))
            cells.append(element("td", "–", class_="none") if metric is None else _cell(metric, depth == 1))
    first = next(iter(found.values()))
    return element(
        "tr",
        element("td", direction(name)),
        cells,
        element("td", first.shown(first.chance), title=first.chance_method or None),
        element("td", f"{first.n:,} in {first.candidates.partition(';')[0].split(' ')[0] or '?'}",
                title=first.candidates or None),
    )  # fmt: skip


def _cell(metric: Metric, full: bool) -> Markup:
    """A recall; of depth 1 with its interval beneath."""
    interval = element("span", metric.shown_interval, class_="range") if full and metric.interval else None
    return element("td", metric.shown(metric.value), interval, title=protocol(metric) or None)


def _grey(name: str, one: Reported, ways: Sequence[str]) -> Markup:
    """The paper's recalls stand under the first columns; how it ordered candidates is not said."""
    cells = [one.figures.get(f"retrieval.{name}.r{depth}") for depth in DEPTHS]
    return element(
        "tr",
        element("td", one.name, element("span", MARK, class_="data")),
        [element("td", "–" if share is None else f"{100 * share:.1f} %") for share in cells],
        element("td", colspan=3 * len(ways) - 1),
        class_="reported",
        title=one.about,
    )


def search(folder: Path, example: Mapping[str, Any]) -> Markup:
    """A query and what was found for it, pictures or texts, the right one ringed; a right picture not found beside it.
    """
    found = [hit for hit in listed(example.get("found")) if isinstance(hit, Mapping)]
    texts = [
        element("p", str(hit["text"]), class_="hit" if hit.get("right") else None) for hit in found if hit.get("text")
    ]
    pictures = [
        picture(folder, hit.get("picture"), class_="hit" if hit.get("right") else "")
        for hit in found if not hit.get("text")
    ]  # fmt: skip
    asked = example.get("text")
    beside = example.get("picture") if asked is None or not any(hit.get("right") for hit in found) else None
    aside = element("div", picture(folder, beside, class_="hit" if asked else ""), class_="asked") if beside else None
    words = element("p", f"“{asked}”") if asked else None
    return element(
        "div",
        element("div", words, aside, class_="given"),
        element("div", texts, class_="texts") if texts else None,
        element("div", pictures, class_="row") if pictures else None,
        class_="query",
    )
