"""HTML without a template language: elements that escape whatever is not markup already."""

from __future__ import annotations

import base64
import html
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


def picture(folder: Path, name: object, title: str = "", class_: str = "") -> Markup:
    """The picture `folder`/`name` inside the page (data URI), or an empty frame when there is no such file."""
    path = folder / name if isinstance(name, str) else None
    if path is None or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return element("div", "no picture", class_=f"missing {class_}")
    kind = "png" if path.suffix == ".png" else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return element("img", src=source, alt=title, title=title, class_=class_, loading="lazy")


def table(
    heads: Sequence[Any], rows: Sequence[Markup], above: Markup | None = None, class_: str | None = None
) -> Markup:
    """A table that scrolls sideways on narrow screens. above: a first row of heads that span columns."""
    head = element("thead", above, element("tr", [element("th", cell, scope="col") for cell in heads]))
    return element("div", element("table", head, element("tbody", rows)), class_=f"scroll {class_ or ''}".strip())


def document(title: str, sections: Iterable[Any]) -> str:
    """A whole HTML document with the style sheet in it."""
    style = Markup((Path(__file__).with_name("page.css")).read_text(encoding="utf-8"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    return f"<!doctype html>\n{element('html', head, element('body', list(sections)), lang='en')}\n"
