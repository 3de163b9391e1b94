"""Figures with their intervals as inline SVG: bars, differences and dot plots, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.page.markup import Markup, element

COLOURS = 8
"""Colours of runs in page.css: run-0 .. run-7, then from the first again; numbers tell the runs apart as well."""


def whisker(value: float, interval: Sequence[float] | None, chance: float | None, top: float = 1.0) -> Markup:
    """A score on a line from 0 to `top`: a bar to the value, its interval as a whisker, the chance level as a tick."""

    def x(share: float) -> float:
        return round(2 + 156 * min(max(share / top, 0), 1), 1)

    parts = [
        element("rect", x=2, y=7, width=156, height=6, rx=3, class_="track"),
        element("rect", x=2, y=7, width=max(x(value) - 2, 0), height=6, rx=3, class_="bar"),
    ]
    if interval is not None:
        parts.append(element("line", x1=x(interval[0]), x2=x(interval[1]), y1=10, y2=10, class_="interval"))
        parts += [element("line", x1=x(end), x2=x(end), y1=6.5, y2=13.5, class_="interval") for end in interval]
    if chance is not None:
        parts.append(element("line", x1=x(chance), x2=x(chance), y1=2, y2=18, class_="chance"))
    return element("svg", parts, viewBox="0 0 160 20", class_="whisker", role="img", aria_label=f"{100 * value:.1f} %")


def difference(value: float, interval: Sequence[float], reach: float) -> Markup:
    """A difference on a line from -`reach` to `reach`: a dot with its interval, nought as a tick."""

    def x(amount: float) -> float:
        return round(80 + 78 * min(max(amount / reach, -1), 1), 1)

    return element(
        "svg",
        element("rect", x=2, y=9, width=156, height=2, rx=1, class_="track"),
        element("line", x1=x(interval[0]), x2=x(interval[1]), y1=10, y2=10, class_="interval"),
        element("line", x1=80, x2=80, y1=2, y2=18, class_="chance"),
        element("circle", cx=x(value), cy=10, r=4, class_="dot"),
        viewBox="0 0 160 20",
        class_="whisker",
        role="img",
        aria_label=f"{100 * value:+.1f}",
    )


@dataclass(frozen=True)
class Dot:
    """One figure on a line of a dot plot."""

    value: float
    interval: Sequence[float] | None
    class_: str
    """Its look in page.css: run-N for a run, r1, r5, r10 for depths of recall."""
    title: str
    """Said on hovering."""


@dataclass(frozen=True)
class Row:
    """A labelled row of a dot plot: one line or more, each with its own dots and a short name."""

    label: Any
    lines: Sequence[tuple[str, Sequence[Dot]]]
    chance: float | None = None


LINE_HEIGHT = 16
TICKS = 4


def dot_plot(rows: Sequence[Row], top: float, ends: tuple[str, str], low: float = 0.0) -> Markup:
    """Rows on a common scale from `low` to `top`, whose ends are called `ends`: dots, intervals, chance as a tick.

    Places are shares of the width, so that the plot fits any screen and letters keep their size.
    """
    cells: list[Markup] = []
    for row in rows:
        names = [element("span", name, class_=f"line {dots[0].class_ if dots else ''}") for name, dots in row.lines]
        cells += [
            element("div", row.label, class_="label"),
            element("div", names, class_="names"),
            _lines(row, low, top),
        ]
    axis = [element("span", end) for end in ends]
    return element("div", cells, element("div", axis, class_="axis"), class_="dots")


def _lines(row: Row, low: float, top: float) -> Markup:
    height = LINE_HEIGHT * len(row.lines)

    def x(value: float) -> str:
        return f"{100 * min(max((value - low) / (top - low), 0), 1):.2f}%"

    parts = [element("line", x1=x(place), x2=x(place), y1=0, y2=height, class_="grid")
             for place in (low + (top - low) * tick / TICKS for tick in range(TICKS + 1))]  # fmt: skip
    if row.chance is not None and low <= row.chance <= top:
        parts.append(element("line", x1=x(row.chance), x2=x(row.chance), y1=1, y2=height - 1, class_="chance"))
    for place, (_, dots) in enumerate(row.lines):
        y = LINE_HEIGHT * (place + 0.5)
        for dot in dots:
            if dot.interval is not None:
                first, last = dot.interval
                parts.append(element("line", x1=x(first), x2=x(last), y1=y, y2=y, class_=f"spread {dot.class_}"))
            parts.append(element("circle", element("title", dot.title), cx=x(dot.value), cy=y, r=4, class_=dot.class_))
    said = "; ".join(dot.title for _, dots in row.lines for dot in dots)
    return element("svg", parts, height=height, role="img", aria_label=said)


def nice_top(values: Sequence[float]) -> float:
    """The end of a scale from 0 that holds all of `values`: few digits."""
    most = max(values, default=0.0)
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * step >= most * (1 - 1e-9))
