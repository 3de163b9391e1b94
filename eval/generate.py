"""`opt generate`: a model's answer to one's own files: words for a picture or a recording, a picture for words.

    files --read_media--> Media --make_record, the extractors of the training--> Sample
        --system.generate_text--> a line of text each
        --system.generate_codes--> (8, 8) codes --code extractor--> a PNG file each

Input that cannot be used is named at the end and leaves the others as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from eval.image_generation import save_picture
from eval.task import in_batches, tiny_networks
from feature_extract.assemble import make_record, read_media
from feature_extract.extractors import Extractors, reopen
from feature_extract.sources.item import Item, NarrationItem
from feature_extract.work import one_thread
from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Sample
from opt.files import make_folder, write_atomic
from opt.progress import progress
from opt.systems.system import Sampling, System

EXTRACTED = {"image": "regions", "audio": "audio", "codes": "codes"}
"""Kind of extractor that each modality needs; drawing needs that of codes."""
NAMED = 3
"""So many inputs that cannot be used are named in the error; --out lists all."""


@dataclass
class GenerateConfig:
    """Options of `opt generate`."""

    model: Annotated[Path, Positional, arg(metavar="MODEL")]
    """Folder of a saved model, such as runs/demo/model."""
    image: tuple[Path, ...] = ()
    """Pictures, one a result."""
    audio: tuple[Path, ...] = ()
    """Recordings, one a result; beside pictures, the first belongs to the first."""
    text: tuple[str, ...] = ()
    """Texts, each in quotes, one a result: what to draw, or words that go with the pictures or recordings."""
    draw: Path | None = None
    """Draw a picture into this PNG file; several become NAME-1.png, NAME-2.png. Without it, text is written."""
    out: Path | None = None
    """Also write the results as JSON lines to this file."""
    batch: int = 16
    """Inputs in one call of the model: speed and memory."""
    sampling: Annotated[Sampling, arg(name="")] = Sampling()
    """How text is searched for and pictures are drawn."""


@dataclass(frozen=True)
class Input:
    """What one result is made from: at least one of the three."""

    text: str | None
    image: Path | None
    audio: Path | None

    @property
    def name(self) -> str:
        """The parts as the user gave them."""
        words = None if self.text is None else f'"{self.text}"'
        name = " + ".join(str(part) for part in (words, self.image, self.audio) if part is not None)
        return name.encode(errors="backslashreplace").decode()  # a file's name may be other bytes than UTF-8

    def item(self) -> Item:
        """As a source of extraction yields it."""
        told = self.text is not None or self.audio is not None
        recording = None if self.audio is None else str(self.audio)
        narrations = (NarrationItem("0", self.text, recording),) if told else ()
        return Item(self.name, () if self.image is None else (str(self.image),), narrations)


def generate(config: GenerateConfig) -> None:
    """Describe a picture, write down what is said, or draw a sentence: your own files, several at once if you like.

    Examples, a caption, a transcript, one from both, two captions by beam search, a picture, one from a recording:

    opt generate runs/demo/model --image photo.jpg

    opt generate runs/demo/model --audio talk.flac

    opt generate runs/demo/model --image photo.jpg --audio talk.flac

    opt generate runs/demo/model --image a.jpg b.jpg --beams 4 --out captions.jsonl

    opt generate runs/demo/model --text "a red circle" --draw circle.png --seed 1

    opt generate runs/demo/model --audio talk.flac --draw heard.png
    """
    inputs, given = _inputs(config)
    system = from_pretrained(config.model)
    extractors = _open_extractors(system, given, config.draw is not None)
    for path in (config.draw, config.out):
        if path is not None:
            make_folder(path.parent)
    samples, failed = _samples(inputs, system, extractors)
    usable = [number for number in range(len(inputs)) if number in samples]
    chosen = [samples[number] for number in usable]
    lines: dict[int, Any]
    if config.draw is None:
        lines = dict(zip(usable, _write(config, system, chosen, given), strict=True))
    else:
        paths = _drawn(config.draw, len(inputs))
        lines = {number: paths[number] for number in usable}
        _draw(config, system, extractors, chosen, given, list(lines.values()))
    for number, line in lines.items():
        print(f"{inputs[number].name}: {line}")
    if config.out is not None:
        _write_lines(config, inputs, lines, failed)
    if failed:
        named = [f"{inputs[number].name} ({reason})" for number, reason in failed.items()]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise UserError(f"{len(named)} of {len(inputs)} could not be used: {'; '.join(named[:NAMED])}{more}")


def _inputs(config: GenerateConfig) -> tuple[list[Input], tuple[str, ...]]:
    """The inputs and the modalities they have. Raises UserError when there is nothing to do, or files do not pair."""
    parts = {"text": config.text, "image": config.image, "audio": config.audio}
    given = tuple(name for name, some in parts.items() if some)
    if not given:
        raise UserError("nothing to begin with: give --image or --audio, or --text with --draw")
    counts = {name: len(parts[name]) for name in given}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} --{name}" for name, count in counts.items())
        raise UserError(f"{said} do not pair up: give as many of each, in the same order")
    if config.draw is None and given == ("text",):
        raise UserError("--text alone is already text: give --draw FILE.png to have it drawn, or --image or --audio")
    if config.draw is not None and "image" in given:
        raise UserError("a picture is drawn from --text or --audio: leave --image out, or leave --draw out for words")
    if config.draw is not None and config.draw.suffix.lower() != ".png":
        raise UserError(f"--draw {config.draw}: the picture is a PNG file, so its name must end in .png")
    if any(not text.strip() for text in config.text):
        raise UserError("--text holds an empty text: say what to draw, or what belongs to the file")
    if any("\ud800" <= letter <= "\udfff" for text in config.text for letter in text):
        raise UserError("--text holds bytes that are not UTF-8: give it in the encoding of the terminal")
    if config.batch < 1:
        raise UserError(f"--batch {config.batch} must be at least 1")
    _check_outputs(config, max(counts.values()))
    columns = [parts[name] or [None] * max(counts.values()) for name in parts]
    return [Input(*row) for row in zip(*columns, strict=True)], given


def _check_outputs(config: GenerateConfig, count: int) -> None:
    """Raises UserError where a result would be written over an input, a folder or another result."""
    inputs = {path.resolve() for path in (*config.image, *config.audio)}
    drawn = [] if config.draw is None else list({config.draw, *_drawn(config.draw, count)})
    outputs = drawn if config.out is None else [*drawn, config.out]
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} is an input, and would be written over: name another file")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError(f"--out {config.out} is where a picture is drawn: name two files")


def _drawn(path: Path, count: int) -> list[Path]:
    """Where the pictures of `count` inputs go."""
    return [path.with_stem(f"{path.stem}-{n}") if count > 1 else path for n in range(1, count + 1)]


def _open_extractors(system: System, given: Sequence[str], drawing: bool) -> Extractors:
    """Those that this model was trained with and that are needed. Raises UserError for what it never saw."""
    facts = system.facts
    sizes = {"image": facts.region_width, "audio": facts.speech_width, "codes": facts.codebook}
    wanted = {}
    for modality in [name for name in given if name != "text"] + ["codes"] * drawing:
        if not sizes[modality]:
            raise UserError(
                "the model was trained without image codes, so it cannot draw: leave --draw out"
                if modality == "codes" else f"the model was trained without {modality}: leave --{modality} out"
            )  # fmt: skip
        kind = EXTRACTED[modality]
        if not facts.extractors.get(kind, {}).get("backend"):
            raise UserError(f"the model does not say which extractor its {kind} came from, so files cannot be read "
                            "for it: train it on shards that `opt extract` made")
        wanted[kind] = facts.extractors[kind]
    extractors = reopen(wanted, str(system.device))
    if tiny := tiny_networks(wanted):
        print(f"features ({', '.join(tiny)}) come from the embedded tiny networks, which know drawn scenes only",
              file=sys.stderr)
    return extractors


def _samples(
    inputs: Sequence[Input], system: System, extractors: Extractors
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Samples by the number of their input, and for the inputs that cannot be used the reason."""
    reading = extractors._replace(codes=None)  # codes are drawn here, never read
    max_seconds = None if reading.audio is None else reading.audio.settings.max_seconds
    samples: dict[int, Sample] = {}
    failed: dict[int, str] = {}
    with one_thread(), progress("extract", total=len(inputs), unit="inputs") as bar:
        for number, given in enumerate(inputs):
            media = read_media(given.item(), Path(), system.preparer().jpeg, max_seconds)
            record, failures = make_record(media, reading)
            if failures or record is None:
                failed[number] = "; ".join(failure.reason.partition(": ")[2] for failure in failures)
            elif record.narrations:
                told = record.narrations[0]
                samples[number] = Sample(record.key, record.pictures, 0, told.narration_id, told.caption, told.speech)
            else:
                samples[number] = Sample(record.key, record.pictures)
            bar.advance()
    return samples, failed


def _write(config: GenerateConfig, system: System, samples: list[Sample], given: Sequence[str]) -> list[str]:
    """One text a sample."""
    return in_batches([partial(_same, sample) for sample in samples],
                      lambda some: system.generate_text(some, given, config.sampling), config.batch, "write")


def _draw(
    config: GenerateConfig, system: System, extractors: Extractors, samples: list[Sample], given: Sequence[str],
    paths: list[Path],
) -> None:
    """One PNG file a sample, at its path."""
    assert extractors.codes is not None
    decode = extractors.codes.decode

    def draw(some: list[Sample]) -> list[Image.Image]:
        codes_B88 = system.generate_codes(some, given, config.sampling).cpu().numpy()
        return [decode(codes_188)[0] for codes_188 in np.split(codes_B88, len(some))]  # a batch would round otherwise

    pictures = in_batches([partial(_same, sample) for sample in samples], draw, config.batch, "draw")
    for path, picture in zip(paths, pictures, strict=True):
        save_picture(path, picture)


def _same(sample: Sample) -> Sample:
    return sample


def _write_lines(
    config: GenerateConfig, inputs: Sequence[Input], lines: dict[int, Any], failed: dict[int, str]
) -> None:
    """JSON lines, one an input in the order given: its parts, then "written", "drawn" or "error"."""
    assert config.out is not None
    content = []
    for number, given in enumerate(inputs):
        said = {"error": failed[number]} if number in failed else {
            "written" if config.draw is None else "drawn": str(lines[number])}  # fmt: skip
        parts = {name: str(part) for name in ("text", "image", "audio") if (part := getattr(given, name)) is not None}
        content.append(json.dumps(parts | said, ensure_ascii=False) + "\n")
    write_atomic(config.out, "".join(content).encode(errors="backslashreplace"))
