"""`opt generate`: a model's answer to one's own files: words for a picture or a recording, a picture for words.

    files --own_files, the extractors of the training--> Sample
        --system.generate_text--> a line of text each
        --system.generate_codes--> (8, 8) codes --code extractor--> a PNG file each

Input that cannot be used is named at the end and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from eval.image_generation import save_picture
from eval.own_files import Input, check_outputs, open_extractors, pair, read_samples, refuse_unusable, write_lines
from eval.reads import reads
from eval.task import in_batches
from feature_extract.extractors import Extractors
from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Sample
from opt.files import make_folder
from opt.systems.system import Sampling, System


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
    extractors = open_extractors(system, given, config.draw is not None)
    for path in (config.draw, config.out):
        if path is not None:
            make_folder(path.parent)
    samples, failed = read_samples(inputs, extractors, reads(system).pixels)
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
        answer = "written" if config.draw is None else "drawn"
        write_lines(config.out, inputs, {number: {answer: str(line)} for number, line in lines.items()}, failed)
    refuse_unusable(inputs, failed)


def _inputs(config: GenerateConfig) -> tuple[list[Input], tuple[str, ...]]:
    """The inputs and the modalities they have. Raises UserError when there is nothing to do, or files do not pair."""
    inputs, given = pair(config.text, config.image, config.audio)
    if not given:
        raise UserError("nothing to begin with: give --image or --audio, or --text with --draw")
    if config.draw is None and given == ("text",):
        raise UserError("--text alone is already text: give --draw FILE.png to have it drawn, or --image or --audio")
    if config.draw is not None and "image" in given:
        raise UserError("a picture is drawn from --text or --audio: leave --image out, or leave --draw out for words")
    if config.draw is not None and config.draw.suffix.lower() != ".png":
        raise UserError(f"--draw {config.draw}: the picture is a PNG file, so its name must end in .png")
    if config.batch < 1:
        raise UserError(f"--batch {config.batch} must be at least 1")
    _check_outputs(config, len(inputs))
    return inputs, given


def _check_outputs(config: GenerateConfig, count: int) -> None:
    """Raises UserError where a result would be written over an input, a folder or another result."""
    drawn = [] if config.draw is None else list({config.draw, *_drawn(config.draw, count)})
    outputs = drawn if config.out is None else [*drawn, config.out]
    check_outputs(outputs, (*config.image, *config.audio))
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError(f"--out {config.out} is where a picture is drawn: name two files")


def _drawn(path: Path, count: int) -> list[Path]:
    """Where the pictures of `count` inputs go."""
    return [path.with_stem(f"{path.stem}-{n}") if count > 1 else path for n in range(1, count + 1)]


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
