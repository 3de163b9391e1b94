"""The sections on words, questions and drawn pictures: one function each, from a run to markup.

A section gives None when its result is missing, and the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.page.cards import Card, gallery, sample, transcript, worst
from eval.page.figures import figures, gains, section
from eval.page.markup import Markup, element, joined, picture
from eval.page.run import Run
from eval.page.words import HINTS, TITLES, is_gain

CONFUSED = 24
"""Confusions of words that are shown; the file beside the results holds more."""
KINDS = {"generated": "generated", "true_codes": "true codes", "picture": "true"}
"""Pictures of a drawn example, in order."""


def plain(
    run: Run, task: str, card: Card = sample, class_: str = "gallery", examples: bool = True, more: Any = None
) -> Markup | None:
    """Figures of any task, its paired differences, `more`, the first of its examples and those that failed worst."""
    result = run.results.get(task)
    if result is None or not (result.metrics or result.examples or result.worst):
        return None
    levels = [metric for metric in result.metrics if not is_gain(metric)]
    gained = [metric for metric in result.metrics if is_gain(metric)]
    return section(
        TITLES.get(task, task), HINTS.get(task),
        figures(levels) if levels else None,
        [element("h3", GAINED.get(task, "Paired differences, in points")), gains(gained)] if gained else None,
        more,
        gallery(run.pictures, result.examples, card, class_) if examples and result.examples else None,
        worst(run.pictures, result, card, class_),
    )  # fmt: skip


GAINED = {"transcribe": "What the picture spares, in points of word error rate"}


def transcription(run: Run) -> Markup | None:
    """Word and character error rates, and the recordings that were written down worst."""
    return plain(run, "transcribe", transcript, examples=False, more=_confusions(run))


def _confusions(run: Run) -> Markup | None:
    """What was said and what was written for it instead, the most frequent first."""
    parts = []
    for given, counts in run.confusions.items():
        said = (f"From {given}, of {counts['words']:,} words: {counts['substitutions']:,} taken for others, "
                f"{counts['deletions']:,} left out, {counts['insertions']:,} added.")  # fmt: skip
        pairs = [
            element("li", element("del", said) if said else None, element("ins", written) if written else None,
                    f" {times:,} ×")
            for said, written, times in counts["confusions"][:CONFUSED]
        ]  # fmt: skip
        parts.append([element("p", said, class_="hint"), element("ul", pairs, class_="confused")])
    key = element("p", "Struck out is what was said, ", element("ins", "shaded"), " what was written.", class_="hint")
    return joined([element("h3", "Words taken for others"), key, parts]) if parts else None


def captions(run: Run) -> Markup | None:
    """Captions by the objects and the words in them, and those that failed worst."""
    return plain(run, "caption", transcript, examples=False)


def samples(run: Run) -> Markup | None:
    """Pictures with true caption, generated caption and transcript, its errors marked."""
    entries: dict[str, dict[str, Any]] = {}
    for task in ("caption", "transcribe"):
        result = run.results.get(task)
        for example in result.examples if result else ():
            entries.setdefault(str(example.get("key")), {}).update(example)
    if not entries:
        return None
    hint = element("p", "The first of the split, not chosen. In transcripts, ", element("ins", "these words"),
                   " were written wrongly and ", element("del", "these"), " were said instead or left out.",
                   class_="hint")  # fmt: skip
    return joined([element("h2", "Samples"), hint, gallery(run.pictures, list(entries.values()), transcript)])


def drawings(run: Run) -> Markup | None:
    """Generated pictures beside the true ones."""
    return plain(run, "text_to_image", drawing, "pairs")


def drawing(folder: Path, example: Mapping[str, Any]) -> Markup:
    """The generated picture, the true one from its codes and as stored, above their words."""
    shown = [
        element("div", picture(folder, example.get(kind)), element("div", words, class_="names"))
        for kind, words in KINDS.items()
    ]
    return element("div", element("div", shown, class_="row"), element("p", example.get("text")), class_="pair")


def others(run: Run) -> list[Markup | None]:
    """Results of tasks that these pages do not know, under their own names."""
    return [plain(run, task) for task in run.results if task not in TITLES]
