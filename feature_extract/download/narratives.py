"""The lines of Localized Narratives that a download is about: those of the first N pictures of a split.

    annotation files, in order --choose--> lines of the chosen pictures, as published

The files of the training split are large (traces of a pointer, most of it). Nothing is read beyond the place where
picture N + 1 first appears; a narration of a chosen picture that stands further down is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SAFE_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)
"""A name that stays in its folder and needs no quoting in a URL."""


@dataclass(frozen=True)
class NarrativeLine:
    """A line as published, and the names of the files it is about; recording: None where nobody spoke."""

    content: bytes
    image_id: str
    recording: str | None


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in blocks, with their ends."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest + b"\n"


def choose(
    lines: Iterable[bytes], pictures: int, annotators: tuple[int, ...], malformed: list[str]
) -> Iterator[NarrativeLine]:
    """The lines of the first `pictures` pictures (0: of all), only those of `annotators` if any are named.

    A line that cannot be read is left out, and added to `malformed` by its number.
    """
    chosen: set[str] = set()
    for number, content in enumerate(lines, start=1):
        try:
            entry = json.loads(content)
            line = NarrativeLine(content, entry["image_id"], entry.get("voice_recording") or None)
            for name in filter(None, (line.image_id, line.recording)):
                if not SAFE_NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is not the name of a file")
            annotator = entry.get("annotator_id")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            malformed.append(f"annotation line {number}")
            continue
        if annotators and annotator not in annotators:
            continue
        if line.image_id not in chosen and len(chosen) == pictures > 0:
            return
        chosen.add(line.image_id)
        yield line
