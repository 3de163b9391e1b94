"""Pictures from captions: codes drawn from text alone, decoded to pixels, and judged.

    captions --system.generate_codes--> (8, 8) codes --code extractor--> 64 x 64 pixels --> each judge of eval/pictures
        object_found   does the region detector find an object that the caption names?
        r_precision    does the picture find its own caption among 100, by the model's own embeddings?
        fidelity       FID and KID: are all pictures together like the true ones?
        clip_score     does CLIP find that picture and caption fit?

The same questions are put to the true pictures decoded from their own codes and to the true pictures as stored: what
the codes lose, and what a judge misses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.pictures.clip_score import Clip, ClipScore, open_clip, without_clip
from eval.pictures.fidelity import Fidelity, without_inception
from eval.pictures.gallery import GENERATED, REAL, TRUE_CODES, Decoder, Gallery, Judge
from eval.pictures.networks import PictureNetwork, open_networks
from eval.pictures.object_found import ObjectFound
from eval.pictures.r_precision import RPrecision
from eval.pictures.sheets import Row, save_picture, write_sheets
from eval.result import Findings, Metric
from eval.task import EXAMPLES, WORST, EvalConfig, Task, open_task
from feature_extract.extractors import load_extractors
from feature_extract.regions import RegionExtractor
from opt.config import UserError
from opt.data.manifest import Manifest
from opt.data.record import Sample
from opt.systems.system import Sampling

ON_SHEETS = 512
"""Captions on sheets at most: 32 sheets are more than anyone looks at."""


@dataclass
class TextToImageConfig(EvalConfig):
    """Options of `opt eval text-to-image`."""

    pictures: int = 100
    """Draw at most so many pictures, one for the first caption of each key."""
    draws: int = 1
    """Pictures of each caption on the sheets, each with the next seed; figures are of the first."""
    sampling: Sampling = Sampling()
    """How codes are drawn: by default among the 32 likeliest."""
    confidence: float = 0.5
    """The detector's least score for an object to count as found."""
    fid_network: tuple[str, ...] = ("tiny",)
    """Networks of FID and KID: tiny (the embedded detector's backbone), inception:FILE (the network of FID, with FILE
    pt_inception-2015-12-05-6726825d.pth of pytorch-fid), or both."""
    clip: Path | None = None
    """Folder of a CLIP checkpoint as transformers has it, for CLIPScore."""


@dataclass(frozen=True)
class Judging:
    """What looks at pictures: the networks that were opened; None or empty where there are none."""

    decoder: Decoder
    extractor: RegionExtractor | None = None
    networks: Sequence[PictureNetwork] = ()
    clip: Clip | None = None


def text_to_image(config: TextToImageConfig) -> None:
    """Draw pictures from captions, and judge them: named objects found, FID and KID, R-precision, CLIPScore.

    Beside the result: text_to_image/sheet-001.png and on, each caption with its drawn and its true pictures.

    Example: opt eval text-to-image runs/demo/model runs/demo/shards/test --sampling.top-k 32
    """
    _check(config)
    task = open_task("text_to_image", "text-to-image", config)
    if not task.system.facts.codebook:
        raise UserError("the model was trained without image codes, so it cannot draw")
    networks = open_networks(config.fid_network)
    clip = None if config.clip is None else open_clip(config.clip)
    decoder, extractor = open_extractors(task.split.reader.manifest)
    task.finish(measure(task, config, Judging(decoder, extractor, networks, clip)))


def _check(config: TextToImageConfig) -> None:
    """Raises UserError for options out of range or that contradict each other."""
    if not 0 <= config.confidence <= 1:
        raise UserError(f"--confidence {config.confidence} must lie in 0 to 1")
    for name in ("pictures", "draws"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 1")
    sampling = config.sampling.for_codes()
    if config.draws > 1 and (sampling.beams > 1 or sampling.top_k == 1):
        raise UserError(f"--draws {config.draws}: {sampling.protocol} draws the same picture each time; leave one out")


def open_extractors(manifest: Manifest) -> tuple[Decoder, RegionExtractor | None]:
    """What made the shards' codes and regions. Raises UserError when the shards hold no codes, or weights are gone."""
    looking = {kind: about for kind, about in manifest.extractors.items() if kind in ("regions", "codes")}
    extractors = load_extractors(dataclasses.replace(manifest, extractors=looking))
    if extractors.codes is None:
        raise UserError("the shards were made without image codes, so there is nothing to draw pictures with")
    return extractors.codes.decode, extractors.regions


def measure(task: Task, config: TextToImageConfig, judging: Judging) -> Findings:
    """Metrics, absent ones with reasons, examples, and the worst; PNG files go to the results.

    Raises UserError without captions.
    """
    numbers = task.split.one_a_picture(task.split.with_all(("text",)))[: config.pictures]
    if not len(numbers):
        raise UserError("nothing to draw: the shards hold no caption")
    drawn = draw(task, numbers, config.sampling, "draw pictures")
    gallery = Gallery(task, drawn, judging.decoder)
    how = config.sampling.for_codes().protocol
    classes = () if judging.extractor is None else judging.extractor.classes
    objects = ObjectFound(task, numbers, classes, config.confidence, how)
    judges: list[Judge] = [objects, RPrecision(task, numbers, judging.extractor, how)]
    judges += [Fidelity(network, config.seed, how) for network in judging.networks]
    judges += [] if judging.clip is None else [ClipScore(task, numbers, judging.clip, how)]
    gallery.show(judges, judging.extractor)
    metrics: list[Metric] = []
    absent: dict[str, str] = {} if judging.clip else without_clip()
    absent |= {} if any(one.name == "inception" for one in judging.networks) else without_inception()
    for judge in judges:
        more = judge.judged()
        metrics += more.metrics
        absent |= more.absent
    _write_sheets(task, config, gallery, numbers[:ON_SHEETS], objects)
    examples = [_example(gallery, number) for number in numbers[:EXAMPLES].tolist()]
    worst = [{**_example(gallery, number), "failure": objects.failure(number)} for number in objects.misses()[:WORST]]
    return Findings(metrics, absent, examples, worst)


def draw(task: Task, numbers: np.ndarray, sampling: Sampling, label: str) -> dict[int, np.ndarray]:
    """Codes (8, 8) int64 drawn from the captions of samples `numbers`, by number."""

    def generate(samples: list[Sample]) -> Sequence[np.ndarray]:
        return list(task.system.generate_codes(samples, ("text",), sampling).cpu().numpy())

    return dict(zip(numbers.tolist(), task.batches(numbers, generate, label), strict=True))


def _write_sheets(
    task: Task, config: TextToImageConfig, gallery: Gallery, numbers: np.ndarray, objects: ObjectFound
) -> None:
    """Sheets with every draw of each caption, and the true pictures."""
    seeds = [config.sampling.seed + more for more in range(config.draws)]
    others = [
        draw(task, numbers, dataclasses.replace(config.sampling, seed=seed), f"draw again, seed {seed}")
        for seed in seeds[1:]
    ]
    titles = [f"generated, seed {seed}" for seed in seeds] + ["true, from codes", "true"]
    rows: list[Row] = []
    for number in numbers.tolist():
        generated = [gallery.picture(GENERATED, number), *(gallery.decode(more[number]) for more in others)]
        pictures = [*generated, gallery.picture(TRUE_CODES, number), gallery.picture(REAL, number)]
        rows.append((task.split.captions[number] or "", objects.seen(number), pictures))
    write_sheets(task.folder / "text_to_image", titles, rows)


def _example(gallery: Gallery, number: int) -> dict[str, Any]:
    """Keep the generated picture and the true one, as its codes hold it, beside the results."""
    task, kept = gallery.task, {}
    for kind, name in ((GENERATED, "generated"), (TRUE_CODES, "true_codes")):
        picture = gallery.picture(kind, number)
        if picture is not None:
            path = task.folder / "text_to_image" / f"{task.split.keys[number]}-{name}.png"
            save_picture(path, picture)
            kept[name] = str(path.relative_to(task.folder))
    return {
        "key": task.split.keys[number],
        "text": task.split.captions[number],
        "picture": task.keep_picture(number),
        **kept,
    }
