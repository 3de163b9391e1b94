"""A user's own pictures, recordings and words as samples that a model reads: for `opt generate` and `opt search`.

    options --pair--> Input, ... --read_media, make_record with the extractors of the training--> Sample

Input that cannot be used leaves the others as they are, and is named at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.provenance import tiny_networks
from eval.reads import reads
from feature_extract.assemble import make_record, read_media
from feature_extract.extractors import Extractors, reopen
from feature_extract.sources.item import Item, NarrationItem
from feature_extract.work import one_thread
from opt.config import UserError
from opt.data.record import Sample
from opt.files import write_atomic
from opt.progress import progress
from opt.systems.system import System

EXTRACTED = {"image": "regions", "audio": "audio", "codes": "codes"}
"""Kind of extractor that each modality needs; drawing needs that of codes. A system that looks at pixels needs none of
regions: the picture as extraction stores it is all it reads."""
NAMED = 3
"""So many inputs that cannot be used are named in the error; --out lists all."""


@dataclass(frozen=True)
class Input:
    """What one answer is made from: at least one of the three."""

    text: str | None
    image: Path | None
    audio: Path | None

    @property
    def parts(self) -> dict[str, str]:
        """The parts that are there, by modality, as the user gave them."""
        return {name: str(part) for name in ("text", "image", "audio") if (part := getattr(self, name)) is not None}

    @property
    def name(self) -> str:
        """The parts in one line."""
        name = " + ".join(f'"{part}"' if modality == "text" else part for modality, part in self.parts.items())
        return name.encode(errors="backslashreplace").decode()  # a file's name may be other bytes than UTF-8

    def item(self) -> Item:
        """As a source of extraction yields it."""
        told = self.text is not None or self.audio is not None
        recording = None if self.audio is None else str(self.audio)
        narrations = (NarrationItem("0", self.text, recording),) if told else ()
        return Item(self.name, () if self.image is None else (str(self.image),), narrations)


def pair(
    text: Sequence[str], image: Sequence[Path], audio: Sequence[Path]
) -> tuple[list[Input], tuple[str, ...]]:
    """The inputs, the first of each option in the first, and the modalities they have. Empty where nothing is given.

    Raises UserError where the options do not pair up, or a text is none.
    """
    parts: dict[str, Sequence[Any]] = {"text": text, "image": image, "audio": audio}
    given = tuple(name for name, some in parts.items() if some)
    counts = {name: len(parts[name]) for name in given}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} --{name}" for name, count in counts.items())
        raise UserError(f"{said} do not pair up: give as many of each, in the same order")
    if any(not one.strip() for one in text):
        raise UserError("--text holds an empty text: give words, or leave it out")
    if any("\ud800" <= letter <= "\udfff" for one in text for letter in one):
        raise UserError("--text holds bytes that are not UTF-8: give it in the encoding of the terminal")
    most = max(counts.values(), default=0)
    columns = [parts[name] or [None] * most for name in parts]
    return [Input(*row) for row in zip(*columns, strict=True)], given


def check_outputs(outputs: Sequence[Path], files: Sequence[Path]) -> None:
    """Raises UserError where an output would be written over one of the user's files, or a folder."""
    inputs = {path.resolve() for path in files}
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} is an input, and would be written over: name another file")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")


def open_extractors(system: System, given: Sequence[str], drawing: bool = False) -> Extractors:
    """Those that this model was trained with and that are needed. Raises UserError for what it never saw."""
    facts, reading, wanted = system.facts, reads(system), {}
    if drawing and not facts.codebook:
        raise UserError("the model was trained without image codes, so it cannot draw: leave --draw out")
    needed = [name for name in given if name != "text" and not (name == "image" and reading.pixels)]
    for modality in needed + ["codes"] * drawing:
        kind = EXTRACTED[modality]
        if kind not in reading.extractors:
            raise UserError(f"the model was trained without {modality}: leave --{modality} out")
        if not facts.extractors.get(kind, {}).get("backend"):
            raise UserError(f"the model does not say which extractor its {kind} came from, so files cannot be read "
                            "for it: train it on shards that `opt extract` made")
        wanted[kind] = facts.extractors[kind]
    extractors = reopen(wanted, str(system.device))
    if tiny := tiny_networks(wanted):
        print(f"features ({', '.join(tiny)}) come from the embedded tiny networks, which know drawn scenes only",
              file=sys.stderr)
    return extractors


def read_samples(
    inputs: Sequence[Input], extractors: Extractors, keep_jpeg: bool
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Samples by the number of their input, and for the inputs that cannot be used the reason."""
    reading = extractors._replace(codes=None)  # codes are drawn, never read
    max_seconds = None if reading.audio is None else reading.audio.settings.max_seconds
    samples: dict[int, Sample] = {}
    failed: dict[int, str] = {}
    with one_thread(), progress("extract", total=len(inputs), unit="inputs") as bar:
        for number, given in enumerate(inputs):
            media = read_media(given.item(), Path(), keep_jpeg, max_seconds)
            record, failures = make_record(media, reading)
            if failures or record is None:
                failed[number] = "; ".join(failure.reason.partition(": ")[2] for failure in failures)
            elif record.narrations:
                told = record.narrations[0]
                samples[number] = Sample(record.key, record.pictures, 0, told.narration_id, told.caption, told.speech,
                                         speech_codes=told.codes)
            else:
                samples[number] = Sample(record.key, record.pictures)
            bar.advance()
    return samples, failed


def write_lines(
    path: Path, inputs: Sequence[Input], answers: Mapping[int, Mapping[str, Any]], failed: Mapping[int, str]
) -> None:
    """JSON lines, one an input in the order given: its parts, then its answer or "error"."""
    lines = [given.parts | ({"error": failed[number]} if number in failed else dict(answers[number]))
             for number, given in enumerate(inputs)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, content.encode(errors="backslashreplace"))


def refuse_unusable(inputs: Sequence[Input], failed: Mapping[int, str]) -> None:
    """Raises UserError that names the inputs that could not be used, where there are any."""
    if failed:
        named = [f"{inputs[number].name} ({reason})" for number, reason in failed.items()]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise UserError(f"{len(named)} of {len(inputs)} could not be used: {'; '.join(named[:NAMED])}{more}")
