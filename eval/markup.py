"""HTML and SVG without a template language: elements that escape what is not markup already, and small charts.

Charts are inline SVG in the page's own colours (CSS classes), so that they follow light and dark and need no script.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOID = {"img", "meta"}


class Markup(str):
    """Text that is markup already; every other string is escaped when it enters an element."""


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """`<name attributes>children</name>`. Lists are flattened, None is left out, `class_` is class, `x_y` is x-y."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = f"<{name}" + "".join(f' {key}="{html.escape(str(value))}"' for key, value in pairs) + ">"
    return Markup(opening if name in VOID else f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Markup:
    """The children one after the other, escaped unless they are markup."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(joined(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else html.escape(str(child)))
    return Markup("".join(parts))


def picture(folder: Path, name: str | None, title: str = "", class_: str = "") -> Markup:
    """The picture `folder`/`name` inside the page (data URI), or an empty frame when there is no such file."""
    path = None if name is None else folder / name
    if path is None or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return element("div", "no picture", class_=f"missing {class_}")
    kind = "png" if path.suffix == ".png" else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return element("img", src=source, alt=title, title=title, class_=class_, loading="lazy")


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


def _polyline(frame: _Frame, points: Sequence[tuple[float, float]], class_: str) -> Markup:
    stride = math.ceil(len(points) / MOST_POINTS)
    kept = points if stride == 1 else [*points[::stride], points[-1]]
    places = [frame.place(x, y) for x, y in kept]
    return element("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=class_)


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
