"""Which labelled objects a text names: "two small red striped circles" names "red circle".

A label is a head noun with its modifiers before it ("red circle", "dining table", "dog"). A text names it where the
head stands, singular or plural, with every modifier before it in the same noun phrase, whatever else stands between.
Where several labels fit one place, the most specific win, so that "a hot dog" names no dog.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from feature_extract.sources.item import clean_key
from opt.config import UserError

_ENDS = """
a an the this that these those and or but with without of in on at to from by for near is are was were has have there
here it its they them he she his her their above below under over beside behind between left right one two three four
five six seven eight nine ten some many several no another other each every next
"""
PHRASE_ENDS = frozenset(_ENDS.split())
"""Words that no noun phrase reaches across: articles, conjunctions, prepositions, verbs, numbers."""


class LabelFinder:
    """Finds the labels of a fixed vocabulary in texts."""

    def __init__(self, labels: Iterable[str]) -> None:
        self._by_head: dict[str, list[tuple[frozenset[str], str]]] = {}
        self._modifiers: set[str] = set()
        for label in sorted(set(labels)):
            *modifiers, head = re.findall(r"\w+", label.lower()) or [""]
            self._modifiers.update(modifiers)
            for form in _forms(head):
                self._by_head.setdefault(form, []).append((frozenset(modifiers), label))

    def find(self, text: str) -> frozenset[str]:
        """The labels that `text` names, in the spelling they were given in."""
        found: set[str] = set()
        phrase: set[str] = set()
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            fitting = [
                (len(modifiers), label) for modifiers, label in self._by_head.get(word, ()) if modifiers <= phrase
            ]
            found |= {label for count, label in fitting if count == max(fitting)[0]}
            if (
                word in self._by_head
            ):  # a head ends its phrase, unless it modifies the next: "diamond" in "diamond ring"
                phrase = {word} & self._modifiers
            elif word in PHRASE_ENDS or not word[0].isalnum():
                phrase = set()
            else:
                phrase.add(word)
        return frozenset(found)


def read_labels(path: Path) -> dict[str, frozenset[str]]:
    """Labels of each picture by record key, from lines {"image_id", "labels"}. Raises UserError naming the line."""
    return read_verdicts(path)[0]


def read_verdicts(path: Path) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Labels of each picture by record key, and those that a person says are absent, of the lines that have "absent".

    Lines {"image_id", "labels", "absent"}, the last one optional (Open Images: verified negatives). Raises UserError
    naming the line.
    """
    if not path.is_file():
        raise UserError(f'{path} does not exist; expected a file of lines {{"image_id": ..., "labels": [...]}}')
    labels: dict[str, frozenset[str]] = {}
    absent: dict[str, frozenset[str]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key = clean_key(entry["image_id"])
            labels[key] = _names(entry["labels"])
            if "absent" in entry:
                absent[key] = _names(entry["absent"])
                if both := labels[key] & absent[key]:
                    raise UserError(f"{path}, line {number}: {min(both)!r} stands in both \"labels\" and \"absent\"; "
                                    "take it out of one of them")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"image_id": text, "labels": [text, ...]}}, and "absent" like '
                '"labels", if it has that'
            ) from error
    if not labels:
        raise UserError(f"{path} holds no labels")
    return labels, absent


def _names(entry: object) -> frozenset[str]:
    """Raises TypeError or ValueError for anything but a list of texts."""
    if not isinstance(entry, list) or not all(isinstance(name, str) for name in entry):
        raise TypeError("must be a list of texts")
    "".join(entry).encode()  # half of a surrogate pair is no text: ValueError
    return frozenset(entry)


def _forms(head: str) -> set[str]:
    """A noun and its regular plurals."""
    forms = {head, f"{head}s", f"{head}es"}
    return forms | {f"{head[:-1]}ies"} if head.endswith("y") else forms
