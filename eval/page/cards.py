"""Cards of examples: pictures and what was said of them; galleries of the first and of those that failed worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.page.markup import Markup, element, joined, picture
from eval.result import Result
from eval.words import align, normalise

SAMPLES = 12
"""Cards in a gallery; the result files hold more."""
TERMS = {
    "statement": "statement", "question": "question", "text": "text", "caption": "caption from the picture",
    "answer": "answer", "answers": "right answer", "labels": "objects in the picture",
}  # fmt: skip
"""What an example's fields are called. Fields of numbers, keys and pictures are not shown as text."""

Card = Callable[[Path, Mapping[str, Any]], Markup]
"""(folder of the pictures, example) -> its card."""


def gallery(folder: Path, examples: Sequence[Mapping[str, Any]], card: Card, class_: str = "gallery") -> Markup:
    """The first cards in a grid; an example with a failure says so above."""
    return element("div", [_failing(card(folder, one), one) for one in examples[:SAMPLES]], class_=class_)


def _failing(card: Markup, example: Mapping[str, Any]) -> Markup:
    failure = example.get("failure")
    return card if failure is None else element("div", element("p", failure, class_="failure"), card, class_="failed")


def worst(folder: Path, result: Result, card: Card, class_: str = "gallery") -> Markup | None:
    """The examples that failed worst, the worst one first."""
    if not result.worst:
        return None
    return joined([element("h3", "Failed worst"), gallery(folder, result.worst, card, class_)])


def sample(folder: Path, example: Mapping[str, Any]) -> Markup:
    """Any example: its picture or pictures, and its texts under their names."""
    images = [picture(folder, name) for name in listed(example.get("pictures")) or [example.get("picture")]]
    images = [element("div", images, class_="two")] if len(images) > 1 else images
    rows = [(words, _text(example[key])) for key, words in TERMS.items() if key in example]
    return element("div", images, terms([row for row in rows if row[1]]), class_="sample")


def statement(folder: Path, example: Mapping[str, Any]) -> Markup:
    """As `sample`; what was asked is a statement, and its answers are verdicts."""
    return sample(folder, {**example, "statement": example.get("question"), "question": None})


def terms(rows: Sequence[tuple[str, Any]]) -> Markup:
    """A list of terms with what they are."""
    return element("dl", [[element("dt", term), element("dd", text)] for term, text in rows])


def listed(value: Any) -> list[Any]:
    """A field of an example that should be a list; what is none counts as empty."""
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(map(str, value)))
    return "" if value is None else str(value)


def transcript(folder: Path, example: Mapping[str, Any]) -> Markup:
    """A picture with its true caption and what was written of it: caption and transcripts, their errors marked."""
    reference = example.get("reference")
    references = [reference] if reference is not None else listed(example.get("references"))[:1]
    rows: list[tuple[str, Any]] = [("true caption", text) for text in references]
    if "caption" in example:
        rows.append(("caption from the picture", example["caption"]))
    hypotheses = example.get("hypotheses")
    for given, hypothesis in hypotheses.items() if isinstance(hypotheses, Mapping) else ():
        rows.append((f"transcript from {given}", marked(str(reference or ""), str(hypothesis))))
    if labels := _text(example.get("labels")):
        rows.append(("objects in the picture", labels))
    return element("div", picture(folder, example.get("picture")), terms(rows), class_="sample")


def marked(reference: str, hypothesis: str) -> Markup:
    """The normalised transcript with wrong words in <ins> and what was said instead in <del>."""
    pieces: list[Any] = []
    for edit in align(normalise(reference).split(), normalise(hypothesis).split()):
        if edit.kind == "equal":
            pieces.append(edit.hypothesis)
        else:
            pieces += [element("del", edit.reference)] if edit.reference else []
            pieces += [element("ins", edit.hypothesis)] if edit.hypothesis else []
        pieces.append(" ")
    return joined(pieces)
