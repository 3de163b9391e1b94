"""The page of several runs: a table and a plot a task, training curves on common axes, how each was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.page.compared import RULE, SIGNS, Compared, compare, reason
from eval.page.dots import COLOURS, Dot, Row, dot_plot, nice_top
from eval.page.figures import measured_by, points, protocol, shared_notes
from eval.page.markup import Markup, document, element, joined, table
from eval.page.provenance import blocks, cell, columns, commands, head, missing
from eval.page.reported import MARK, Reported, reported, source
from eval.page.run import Run
from eval.page.single import tiny
from eval.page.training import together
from eval.page.words import HINTS, RECALL, TITLES, is_gain, words
from eval.result import Metric

MOST_PLOTTED = 8
"""The plots of more runs are folded away: they are long."""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    tasks = dict.fromkeys([task for task in TITLES if any(task in run.results for run in runs)])
    tasks |= dict.fromkeys(task for run in runs for task in run.results)
    sections = [header(runs), listed(runs), *(of_task(runs, task) for task in tasks), together(runs), absent(runs),
                provenance(runs)]  # fmt: skip
    return document(f"{len(runs)} runs side by side", sections)


def number(place: int) -> Markup:
    """A run's number in its colour."""
    return element("span", place + 1, class_=f"number run-{place % COLOURS}")


def header(runs: Sequence[Run]) -> Markup:
    """What is compared, and by which rule a figure is bold."""
    return joined([
        element("h1", f"{len(runs)} runs side by side"),
        element("p", RULE, class_="lead"),
        element("p", f"Grey columns are what {source()} reports on other data; they are compared with nothing here.",
                class_="hint"),
        element("p", "In plots a line is the 95 % interval, the mark ", element("span", class_="key"),
                " chance; what is compared with nothing is pale.", class_="hint"),
        tiny(*runs),
    ])  # fmt: skip


def listed(runs: Sequence[Run]) -> Markup:
    """A row a run: its number and name, system, steps, and what it was measured with."""
    names = [name for name in columns([result for run in runs for result in run.results.values()])
             if name not in ("seed", "samples", "text_limit")]  # fmt: skip
    rows = []
    for place, run in enumerate(runs):
        results = list(run.results.values())
        steps = f"{run.training[-1]['step']:,}" if run.training else "–"
        rows.append(element(
            "tr",
            element("td", number(place), " ", run.name),
            element("td", "nothing here" if run.empty else f"{len(results)}", title=", ".join(run.results)),
            element("td", steps),
            [_several([getattr(result.provenance, name) for result in results], name) for name in names],
        ))  # fmt: skip
    return table(["run", "results", "steps", *map(head, names)], rows, class_="runs")


def _several(values: Sequence[Any], name: str) -> Markup:
    """A field that a run's results share, or how many different ones they have."""
    different = list({repr(value): value for value in values}.values())
    if not different:
        return element("td", "–", class_="none")
    return cell(different[0], name) if len(different) == 1 else element("td", f"{len(different)} different")


def of_task(runs: Sequence[Run], task: str) -> Markup | None:
    """The table of a task, its plot, its paired differences."""
    rows = compare(runs, task)
    if not rows:
        return None
    gained = [row for row in rows if is_gain(row.first)]
    deeper = [row for row in rows if (found := RECALL.fullmatch(row.first.name)) and found["depth"] != "1"]
    levels = [row for row in rows if row not in gained and row not in deeper]
    plot = _plot(runs, levels)
    if plot is not None and len(runs) > MOST_PLOTTED:
        plot = element("details", element("summary", "The same as a plot"), plot)
    return joined([
        element("h2", TITLES.get(task, task)),
        element("p", HINTS[task], class_="hint") if task in HINTS else None,
        _table(runs, task, levels) if levels else None,
        plot,
        element("details", element("summary", "Recall at greater depths"), _table(runs, task, deeper)) if deeper
        else None,
        element("details", element("summary", "Paired differences within each run, in points"),
                _table(runs, task, gained)) if gained else None,
    ])  # fmt: skip


def _table(runs: Sequence[Run], task: str, rows: Sequence[Compared]) -> Markup:
    """Figures as rows, runs as columns, then the paper's in grey, chance and n; the reasons of gaps beneath."""
    tables = reported([row.first.name for row in rows])
    heads = [element("span", number(place), " ", run.name, class_="run") for place, run in enumerate(runs)]
    heads += [element("span", f"{one.name}: {MARK}", class_="run reported", title=one.about) for one in tables]
    body = [
        element(
            "tr",
            _label(row.first),
            [_cell(runs[place], task, row, place) for place in range(len(runs))],
            [_grey(row.first, one) for one in tables],
            element("td", _range([row.first.shown(metric.chance) for metric in row.equals]), class_="aside",
                    title=row.first.chance_method or None),
            element("td", _range([f"{metric.n:,}" for metric in row.equals]), class_="aside"),
        )
        for row in rows
    ]  # fmt: skip
    said = measured_by([metric for row in rows for metric in row.equals], _common(rows))
    return joined([table(["", *heads, "chance", "n"], body, class_="compared"), _notes(runs, task, rows, tables), said])


def _common(rows: Sequence[Compared]) -> list[str]:
    """Notes that most figures of a run share, with the numbers of the runs unless all have them."""
    columns = [[metric for metric in column if metric is not None]
               for column in zip(*(row.metrics for row in rows), strict=True)]  # fmt: skip
    having: dict[str, list[str]] = {}
    for place, metrics in enumerate(columns):
        for note in shared_notes(metrics):
            having.setdefault(note, []).append(str(place + 1))
    measured = sum(map(bool, columns))
    return [note if len(runs) == measured else f"{note} ({', '.join(runs)})" for note, runs in having.items()]


def _label(metric: Metric) -> Markup:
    """A figure's name, what comes after a second comma beneath it."""
    first, _, way = words(metric).rpartition(", ") if words(metric).count(", ") > 1 else (words(metric), "", "")
    return element("td", first, element("span", way, class_="data") if way else None, title=metric.name)


def _range(texts: Sequence[str]) -> str:
    """What figures have in common, or the first and last of what they have."""
    different = list(dict.fromkeys(texts))
    return different[0] if len(different) == 1 else f"{min(different)} to {max(different)}"


def _cell(run: Run, task: str, row: Compared, place: int) -> Markup:
    metric, signs = row.metrics[place], row.signs[place]
    if metric is None:
        return element("td", "–", class_="none", title=reason(run, task, row.first.name))
    shown = points(metric.value) if is_gain(metric) else metric.shown(metric.value)
    apart = f"; n {metric.n:,}, chance {metric.shown(metric.chance) or 'unknown'}" if signs else ""
    return element(
        "td",
        element("b", shown) if place == row.best else shown,
        element("sup", ",".join(signs)) if signs else None,
        element("span", metric.shown_interval, class_="range") if metric.interval else None,
        class_="apart" if signs else None,
        title=protocol(metric) + apart,
    )


def _grey(metric: Metric, one: Reported) -> Markup:
    value = one.figures.get(metric.name)
    return element("td", None if value is None else metric.shown(value), class_="reported", title=one.about)


def _notes(runs: Sequence[Run], task: str, rows: Sequence[Compared], tables: Sequence[Reported]) -> Markup | None:
    """What letters, dashes and grey columns of a table mean."""
    used = {sign for row in rows for signs in row.signs for sign in signs}
    notes = [joined([element("sup", sign), f" {meaning}"]) for sign, meaning in SIGNS.values() if sign in used]
    gaps: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        for place, metric in enumerate(row.metrics):
            if metric is None:
                gaps.setdefault((place, reason(runs[place], task, row.first.name)), []).append(words(row.first))
    for (place, why), lost in gaps.items():
        what = lost[0] if len(lost) == 1 else f"{len(lost)} figures"
        notes.append(joined([number(place), f" – {what}: {why}"]))
    notes += [joined([f"{one.name}: {one.data}; {one.protocol}"]) for one in tables]
    return element("ul", [element("li", note) for note in notes], class_="small notes") if notes else None


def _plot(runs: Sequence[Run], rows: Sequence[Compared]) -> Markup | None:
    """Dots with intervals, a line a run: shares on a common scale, each score on its own."""
    groups: dict[str, list[Compared]] = {}
    for row in rows:
        groups.setdefault(_axis(row), []).append(row)
    mixed = len({row.first.better for row in rows}) > 1
    return element("div", [_scale(runs, some, mixed) for some in groups.values()]) if groups else None


def _axis(row: Compared) -> str:
    """Rows of one axis have the same: scores by their protocol, shares by what is better, those beyond 1 alone."""
    first = row.first
    if first.unit == "score":
        return first.protocol or first.name
    return first.name if max(_ends(row)) > 1 else first.better  # CIDEr-D would squeeze BLEU beside it


def _ends(row: Compared) -> list[float]:
    """The ends of a row's intervals, or its figures."""
    return [end for metric in row.metrics if metric is not None for end in metric.interval or (metric.value,)]


def _scale(runs: Sequence[Run], rows: Sequence[Compared], mixed: bool) -> Markup:
    """Rows on a common scale that begins at nought, or below where figures do. mixed: say which are better lower."""
    ends = [end for row in rows for end in _ends(row)]
    low, top = -nice_top([-end for end in ends]) if min(ends) < 0 else 0.0, nice_top(ends)
    said = [f"{100 * end:g} %" if rows[0].first.unit == "share" and end else f"{end:g}" for end in (low, top)]
    drawn = []
    for row in rows:
        lines = [
            (str(place + 1), [Dot(metric.value, metric.interval, f"run-{place % COLOURS}{' apart' if sign else ''}",
                                  f"{runs[place].name}: {metric.shown(metric.value)}")])
            for place, (metric, sign) in enumerate(zip(row.metrics, row.signs, strict=True)) if metric is not None
        ]  # fmt: skip
        lower = element("span", " (lower is better)") if mixed and row.first.better == "lower" else None
        drawn.append(Row(joined([words(row.first), lower]), lines, row.first.chance))
    return dot_plot(drawn, top, (said[0], said[1]), low)


def absent(runs: Sequence[Run]) -> Markup | None:
    """What each run lacks, and why."""
    parts = []
    for place, run in enumerate(runs):
        if run.empty:
            parts.append(element("p", number(place), f" {run.name}: neither result nor training is in its folder."))
        elif lost := missing(run):
            entries = [element("li", element("code", name), f": {why}") for name, why in lost]
            title = element("summary", number(place), f" {run.name}: {len(lost)} not measured")
            parts.append(element("details", title, element("ul", entries, class_="absent")))
    return joined([element("h2", "Not measured"), parts]) if parts else None


def provenance(runs: Sequence[Run]) -> Markup:
    """The commands and settings of every run, folded."""
    folded = [
        element("details", element("summary", number(place), f" {run.name}"), commands(run),
                blocks(run))
        for place, run in enumerate(runs) if run.results or run.config
    ]  # fmt: skip
    return joined([element("h2", "How to get these figures again"), folded])
