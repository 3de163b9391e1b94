"""HTML and SVG without a template language: elements that escape what is not markup already, and three small charts.

Charts are inline SVG in the page's own colours (CSS classes), so that they follow light and dark and need no script.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
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


def curve(title: str, xs: Sequence[float], ys: Sequence[float], width: int = 300, height: int = 132) -> Markup:
    """One line chart: every value faint, a running mean over it, first and last step and three heights labelled."""
    left, right, top, bottom = 40, 8, 10, 22
    smooth = _smoothed(ys)
    low, high = _nice_range(min(ys), max(ys))

    def points(values: Sequence[float]) -> str:
        span = (xs[-1] - xs[0]) or 1
        return " ".join(
            f"{left + (width - left - right) * (x - xs[0]) / span:.1f},"
            f"{top + (height - top - bottom) * (1 - (y - low) / (high - low)):.1f}"
            for x, y in zip(xs, values, strict=True)
        )

    grid = []
    for share in (0.0, 0.5, 1.0):
        y = top + (height - top - bottom) * (1 - share)
        grid.append(element("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        grid.append(element("text", f"{low + share * (high - low):.3g}", x=left - 6, y=y + 3.5, text_anchor="end"))
    steps = [
        element("text", f"{xs[0]:g}", x=left, y=height - 6, text_anchor="start"),
        element("text", f"step {xs[-1]:g}", x=width - right, y=height - 6, text_anchor="end"),
    ]
    lines = [
        element("polyline", points=points(ys), class_="raw"),
        element("polyline", points=points(smooth), class_="smooth"),
    ]
    chart = element(
        "svg", grid, steps, lines, viewBox=f"0 0 {width} {height}", class_="curve", role="img", aria_label=title
    )
    return element("figure", element("figcaption", title, element("b", f"{smooth[-1]:.3g}")), chart)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a fortieth of all on either side; fewer at the ends, so nothing lags."""
    reach, count = len(values) // 40, len(values)
    means = []
    for place in range(count):
        near = min(reach, place, count - 1 - place)
        window = values[place - near : place + near + 1]
        means.append(sum(window) / len(window))
    return means


def _nice_range(low: float, high: float) -> tuple[float, float]:
    """A range with round ends around low..high."""
    if high <= low:
        return low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10(high - low))
    step = step / 5 if (high - low) / step < 2 else step / 2
    return math.floor(low / step) * step, math.ceil(high / step) * step
