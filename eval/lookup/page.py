"""The page of `opt search --page`: each query with what was found for it, pictures inside the file."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.lookup.vectors import Entry
from eval.own_files import Input
from eval.page.markup import Markup, document, element
from opt.data.record import Sample
from opt.data.shards import ShardReader


class Found(NamedTuple):
    """An entry of the index, its similarity to the query, and with --rerank the log-odds that they belong together."""

    entry: Entry
    similarity: float
    matching: float | None = None


def page(
    inputs: Sequence[Input], samples: Mapping[int, Sample], answers: Mapping[int, Sequence[Found]],
    failed: Mapping[int, str], shards: ShardReader, among: str,
) -> str:
    """The whole HTML document. samples, answers and failed go by the number of their input."""
    hint = (f"The nearest of {among}, best first. Similarity is the inner product of the model's unit vectors, 1 at "
            "most; equals stand in the order of the index.")
    if any(one.matching is not None for found in answers.values() for one in found):
        hint += (" The first of them are ordered anew by matching: the model reads query and found together and gives "
                 "the log-odds that they belong together.")
    sections = [
        element("section", _query(given, samples.get(number)),
                element("p", f"could not be used: {failed[number]}", class_="note") if number in failed
                else element("div", [_card(rank, one, shards) for rank, one in enumerate(answers[number], start=1)],
                             class_="gallery"))
        for number, given in enumerate(inputs)
    ]
    return document("Search", [element("h1", "Search"), element("p", hint, class_="lead"), sections])


def _query(given: Input, sample: Sample | None) -> list[Markup]:
    """What was asked: its words as the heading, its picture, its recording to listen to."""
    files = " + ".join(path.name for path in (given.image, given.audio) if path is not None)
    files = files.encode(errors="backslashreplace").decode()
    parts = [element("h2", f"“{given.text}”" if given.text is not None else files, style="overflow-wrap: anywhere")]
    if given.text is not None and files:
        parts.append(element("p", f"and {files}", class_="hint"))
    if sample is not None and sample.pictures:
        parts.append(element("img", src=_jpeg(sample), alt="the query", style="max-width: 14rem; border-radius: 10px"))
    if given.audio is not None and given.audio.is_file():
        parts.append(element("audio", controls="", src=_data(given.audio), style="display: block; max-width: 100%; "
                             "margin: 1rem 0"))
    return parts


def _card(rank: int, found: Found, shards: ShardReader) -> Markup:
    """One entry: the picture of its record, rank and scores, caption, key."""
    source = _jpeg(shards.sample(found.entry.sample, jpeg=True))
    scores = f"similarity {found.similarity:.3f}"
    if found.matching is not None:
        scores += f", matching {found.matching:+.2f}"
    caption = found.entry.caption
    return element(
        "div",
        element("img", src=source, alt=caption or found.entry.key, loading="lazy") if source
        else element("div", "no picture", class_="missing"),
        element("dl", element("dt", f"{rank} · {scores}"), element("dd", caption) if caption else None,
                element("dt", found.entry.key)),
        class_="sample",
    )  # fmt: skip


def _jpeg(sample: Sample) -> str | None:
    """The sample's picture as a data URI."""
    content = sample.pictures[0].jpeg if sample.pictures else None
    return None if content is None else f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _data(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "audio/wav"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
