"""Pictures from captions: codes drawn from text alone, decoded to pixels, and looked at by the region detector.

    captions --system.generate_codes--> (8, 8) codes --code extractor--> 64 x 64 pixels --detector--> class names
                                                                 is an object that the caption names among them?

The same question is put to the true picture decoded from its own codes, to the stored picture, and to the generated
pictures of other captions: what the codes lose, what the detector misses, and chance.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.naming import LabelFinder
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, EvalConfig, Task, open_task
from feature_extract.extractors import load_extractors
from opt.config import UserError
from opt.data.manifest import Manifest
from opt.data.record import Sample
from opt.files import write_atomic
from opt.progress import progress
from opt.systems.system import Sampling

FOUND = "text_to_image.object_found"
DETECTOR_SIDE = 256
"""Smaller pictures are enlarged to so many pixels a side before the detector looks at them."""
SHEET_ROWS, SHEET_CELL, SHEET_TEXT = 16, 128, 420

Decoder = Callable[[np.ndarray], Sequence[Image.Image]]
"""Codes (B, 8, 8) int64 -> B pictures."""
Detector = Callable[[Image.Image], frozenset[str]]
"""A picture -> the names of the classes found in it."""


@dataclass
class TextToImageConfig(EvalConfig):
    """Options of `opt eval text-to-image`."""

    pictures: int = 100
    """Draw at most so many pictures, one for the first caption of each key."""
    sampling: Sampling = Sampling()
    """How codes are drawn: by default among the 32 likeliest."""
    confidence: float = 0.5
    """The detector's least score for an object to count as found."""


def text_to_image(config: TextToImageConfig) -> None:
    """Draw pictures from captions: in how many does the detector find an object that the caption names?

    Example: opt eval text-to-image runs/demo/model runs/demo/shards/test --sampling.top-k 32
    """
    if not 0 <= config.confidence <= 1:
        raise UserError(f"--confidence {config.confidence} must lie in 0 to 1")
    if config.pictures < 1:
        raise UserError(f"--pictures {config.pictures} must be at least 1")
    task = open_task("text_to_image", "text-to-image", config)
    manifest = task.split.reader.manifest
    if not task.system.facts.codebook:
        raise UserError("the model was trained without image codes, so it cannot draw")
    decoder, detector = open_extractors(manifest, config.confidence)
    task.finish(measure(task, config, manifest.region_classes, decoder, detector))


def open_extractors(manifest: Manifest, confidence: float) -> tuple[Decoder, Detector]:
    """What made the shards' codes and regions. Raises UserError when the shards hold none, or weights are gone."""
    looking = {kind: about for kind, about in manifest.extractors.items() if kind in ("regions", "codes")}
    extractors = load_extractors(dataclasses.replace(manifest, extractors=looking))
    regions, codes = extractors.regions, extractors.codes
    if codes is None:
        raise UserError("the shards were made without image codes, so there is nothing to draw pictures with")

    def detect(picture: Image.Image) -> frozenset[str]:
        if regions is None:
            return frozenset()
        found = regions(picture)
        return frozenset(regions.classes[number] for number in found.classes[found.scores >= confidence])

    return codes.decode, detect


def measure(
    task: Task, config: TextToImageConfig, classes: Sequence[str], decoder: Decoder, detector: Detector
) -> Findings:
    """Metrics, absent ones with reasons, and examples; PNG files go to the results. Needs captions: UserError."""
    split = task.split
    numbers = split.one_a_picture(split.with_all(("text",)))[: config.pictures]
    if not len(numbers):
        raise UserError("nothing to draw: the shards hold no caption")

    def draw(samples: list[Sample]) -> Sequence[Image.Image]:
        return decoder(task.system.generate_codes(samples, ("text",), config.sampling).cpu().numpy())

    drawn = dict(zip(numbers.tolist(), task.batches(numbers, draw, "draw pictures"), strict=True))
    decoded, stored = _true_pictures(task, numbers, decoder)
    pictures = {FOUND: drawn, f"{FOUND}_true_codes": decoded, f"{FOUND}_real": stored}
    finder = LabelFinder(classes)
    named = {number: finder.find(split.captions[number] or "") for number in numbers.tolist()}
    asked = np.array([number for number in numbers if named[number]], np.int64)
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    for name, some in pictures.items():
        judged = np.array([number for number in asked.tolist() if number in some], np.int64)
        if len(judged):
            metrics.append(_object_found(task, config, name, judged, some, named, detector))
        elif not classes:
            absent[name] = "the detector's classes have no names"
        else:
            absent[name] = "no picture of this kind" if len(asked) else "no caption names a class of the detector"
    examples = [_example(task, number, drawn, decoded) for number in numbers[:EXAMPLES].tolist()]
    write_sheet(task.folder / "text_to_image" / "sheet.png", task, numbers[:SHEET_ROWS].tolist(), pictures)
    return Findings(metrics, absent, examples)


def _object_found(
    task: Task,
    config: TextToImageConfig,
    name: str,
    numbers: np.ndarray,
    pictures: dict[int, Image.Image],
    named: dict[int, frozenset[str]],
    detector: Detector,
) -> Metric:
    """Share of pictures in which an object is found that their caption names; chance: that another's caption names."""
    seen: dict[int, frozenset[str]] = {}
    with progress(f"look for objects, {name.rpartition('.')[2]}", total=len(numbers), unit="pictures") as bar:
        for number in numbers.tolist():
            seen[number] = detector(_enlarged(pictures[number]))
            bar.advance()
    found = np.array([bool(seen[number] & named[number]) for number in numbers.tolist()])
    partners = zip(numbers.tolist(), task.strangers(numbers).tolist(), strict=True)
    return measured(
        name,
        found.astype(float),
        config.seed,
        chance=float(np.mean([bool(seen[number] & named[other]) for number, other in partners])),
        chance_method="the same pictures, captions of others",
        modalities=("text",) if name == FOUND else ("image",),
        direction="text -> image",
        normaliser=f"detector score of at least {config.confidence}; noun and modifiers in one noun phrase",
        note=config.sampling.for_codes().protocol if name == FOUND else "",
    )


def _enlarged(picture: Image.Image) -> Image.Image:
    """The picture with its short side at least DETECTOR_SIDE."""
    scale = DETECTOR_SIDE / min(picture.size)
    if scale <= 1:
        return picture
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _true_pictures(
    task: Task, numbers: np.ndarray, decoder: Decoder
) -> tuple[dict[int, Image.Image], dict[int, Image.Image]]:
    """The true pictures by sample number: decoded from their codes, and as stored; those that there are."""
    decoded: dict[int, Image.Image] = {}
    stored: dict[int, Image.Image] = {}
    for number in numbers[task.split.has["image"][numbers]].tolist():
        picture = task.split.sample(number, jpeg=True).pictures[0]
        if picture.codes is not None:
            decoded[number] = decoder(picture.codes[None].astype(np.int64))[0]
        if picture.jpeg is not None:
            stored[number] = Image.open(io.BytesIO(picture.jpeg)).convert("RGB")
    return decoded, stored


def _example(task: Task, number: int, drawn: dict[int, Image.Image], decoded: dict[int, Image.Image]) -> dict[str, Any]:
    """Keep the generated picture and the true one, as its codes hold it, beside the results."""
    kept = {}
    for kind, pictures in (("generated", drawn), ("true_codes", decoded)):
        if number in pictures:
            path = task.folder / "text_to_image" / f"{task.split.keys[number]}-{kind}.png"
            save_picture(path, pictures[number])
            kept[kind] = str(path.relative_to(task.folder))
    return {
        "key": task.split.keys[number],
        "text": task.split.captions[number],
        "picture": task.keep_picture(number),
        **kept,
    }


def write_sheet(path: Path, task: Task, numbers: list[int], pictures: dict[str, dict[int, Image.Image]]) -> None:
    """One row a caption: the words, the generated picture, the true one from its codes, the stored one."""
    sheet = Image.new("RGB", (SHEET_TEXT + len(pictures) * (SHEET_CELL + 8), len(numbers) * (SHEET_CELL + 8)), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for row, number in enumerate(numbers):
        top = row * (SHEET_CELL + 8)
        words = "\n".join(textwrap.wrap(task.split.captions[number] or "", 46)[:6])
        canvas.multiline_text((12, top + 12), words, fill="black", font=font, spacing=6)
        for column, some in enumerate(pictures.values()):
            if number in some:
                cell = some[number].resize((SHEET_CELL, SHEET_CELL), Image.Resampling.BICUBIC)
                sheet.paste(cell, (SHEET_TEXT + column * (SHEET_CELL + 8), top + 4))
    save_picture(path, sheet)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
