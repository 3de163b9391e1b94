"""Line charts over training steps: one run's figure with what belongs to it, or the same figure of many runs.

Charts are inline SVG in the page's own colours (CSS classes), so that they follow light and dark and need no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.page.markup import Markup, element


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points in order. One with few points shows them as dots."""

    name: str
    points: Sequence[tuple[float, float]]


MOST_POINTS = 600
"""A line of more points is drawn through every so-manieth of them."""
DOTTED = 40
"""A second line of at most so many points is dotted."""


def curve(
    title: str, main: Line, second: Line | None = None, best: tuple[float, float] | None = None,
    zero: bool = False, log: bool = False, unit: str = "", width: int = 300,
) -> Markup:
    """A line chart: every value of `main` faint and a running mean over it, `second` as it is, a ring at `best`.

    First and last step and three heights are labelled, last values stand in the title. zero: heights begin at nought.
    log: equal heights are equal factors (values must be above 0).
    """
    lines = [line for line in (main, second) if line is not None]
    values = [math.log10(y) if log else y for line in lines for _, y in line.points]
    low, high = _nice_range(min(values), max(values), zero)
    if log:  # whole powers of ten
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    steps = [x for line in lines for x in (line.points[0][0], line.points[-1][0])]
    frame = _Frame(min(steps), max(steps), low, high, log, width)
    smooth = list(zip([x for x, _ in main.points], _smoothed([y for _, y in main.points]), strict=True))
    drawn = [_polyline(frame, main.points, "raw"), _polyline(frame, smooth, "smooth")]
    ends = [element("b", f"{short(smooth[-1][1])}{unit}")]
    if second is not None:
        drawn.append(_polyline(frame, second.points, "second"))
        if len(second.points) <= DOTTED:
            drawn += [_circle(frame, point, 2, "second") for point in second.points]
        ends.append(element("span", f"{second.name} {short(second.points[-1][1])}{unit}", class_="second"))
    if best is not None:
        drawn.append(_circle(frame, best, 5, "best"))
        ends.append(element("span", f"best {short(best[1])}{unit} at step {best[0]:g}", class_="best"))
    chart = element("svg", frame.drawn(), drawn, viewBox=f"0 0 {width} {frame.height}", class_="curve", role="img",
                    aria_label=title)
    wide = "wide" if width > 300 else None
    return element("figure", element("figcaption", title, element("span", ends, class_="ends")), chart, class_=wide)


@dataclass(frozen=True)
class Overlay:
    """A run's line among those of others."""

    name: str
    class_: str
    """Its colour and dashes in page.css."""
    points: Sequence[tuple[float, float]]


def overlay(title: str, lines: Sequence[Overlay], width: int = 300) -> Markup:
    """The running means of the same figure of several runs on common axes."""
    smooth = [_smoothed([y for _, y in line.points]) for line in lines]
    low, high = _nice_range(min(map(min, smooth)), max(map(max, smooth)))
    steps = [x for line in lines for x in (line.points[0][0], line.points[-1][0])]
    frame = _Frame(min(steps), max(steps), low, high, False, width)
    drawn = [
        _polyline(frame, list(zip([x for x, _ in line.points], means, strict=True)), f"overlay {line.class_}",
                  f"{line.name}: last {short(means[-1])}")
        for line, means in zip(lines, smooth, strict=True)
    ]  # fmt: skip
    chart = element("svg", frame.drawn(), drawn, viewBox=f"0 0 {width} {frame.height}", class_="curve", role="img",
                    aria_label=title)  # fmt: skip
    return element("figure", element("figcaption", title), chart, class_="wide" if width > 300 else None)


@dataclass(frozen=True)
class _Frame:
    """From steps and values (their logarithms when `log`) to places in the chart."""

    first: float
    last: float
    low: float
    high: float
    log: bool
    width: int
    height: int = 132

    left, right, top, bottom = 40, 8, 10, 22

    def place(self, x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if self.log else y
        across = (x - self.first) / ((self.last - self.first) or 1)
        up = (y - self.low) / (self.high - self.low)
        return (round(self.left + (self.width - self.left - self.right) * across, 1),
                round(self.top + (self.height - self.top - self.bottom) * (1 - up), 1))

    def drawn(self) -> list[Markup]:
        """Three heights and two steps with their labels."""
        parts = []
        for share in (0.0, 0.5, 1.0):
            value, end = self.low + share * (self.high - self.low), self.width - self.right
            y = round(self.top + (self.height - self.top - self.bottom) * (1 - share), 1)
            parts.append(element("line", x1=self.left, x2=end, y1=y, y2=y, class_="grid"))
            parts.append(element("text", short(10**value if self.log else value), x=self.left - 6, y=y + 3.5,
                                 text_anchor="end"))
        return [
            *parts,
            element("text", f"{self.first:g}", x=self.left, y=self.height - 6, text_anchor="start"),
            element("text", f"step {self.last:g}", x=self.width - self.right, y=self.height - 6, text_anchor="end"),
        ]


def _polyline(frame: _Frame, points: Sequence[tuple[float, float]], class_: str, title: str | None = None) -> Markup:
    stride = math.ceil(len(points) / MOST_POINTS)
    kept = points if stride == 1 else [*points[::stride], points[-1]]
    places = [frame.place(x, y) for x, y in kept]
    said = None if title is None else element("title", title)
    return element("polyline", said, points=" ".join(f"{x},{y}" for x, y in places), class_=class_)


def _circle(frame: _Frame, point: tuple[float, float], radius: float, class_: str) -> Markup:
    x, y = frame.place(*point)
    return element("circle", cx=x, cy=y, r=radius, class_=class_)


def short(value: float) -> str:
    """A number in five characters or so: `0.0123`, `3.46`, `1,234`, `12.3k`, `4.1M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a fortieth of all on either side; fewer at the ends, so nothing lags."""
    reach, count = len(values) // 40, len(values)
    means = []
    for place in range(count):
        near = min(reach, place, count - 1 - place)
        window = values[place - near : place + near + 1]
        means.append(sum(window) / len(window))
    return means


def _nice_range(low: float, high: float, zero: bool = False) -> tuple[float, float]:
    """A range with round ends around low..high; with `zero`, from nought."""
    low = min(low, 0.0) if zero else low
    if high <= low:
        return (low, low + 1) if zero else (low - 0.5, high + 0.5)
    step = 10 ** math.floor(math.log10(high - low))
    step = step / 5 if (high - low) / step < 2 else step / 2
    return math.floor(low / step) * step, math.ceil(high / step) * step
