"""The pictures that are judged: generated ones, the true ones decoded from their codes, the true ones as stored.

    Gallery: codes (8, 8) by sample --decoder--> pictures --region extractor--> Seen, a batch at a time, to each Judge

Kept are codes and samples' numbers; a picture exists while it is looked at, so that 30,000 need the memory of a batch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from eval.result import Metric
from eval.task import Task
from feature_extract.codes import SIDE
from feature_extract.regions import RegionExtractor, Regions
from opt.progress import progress

GENERATED, TRUE_CODES, REAL = "", "_true_codes", "_real"
KINDS = {GENERATED: "generated pictures", TRUE_CODES: "true pictures from their codes", REAL: "true pictures"}
"""What there is to look at, by the suffix of its metrics."""
DETECTOR_SIDE = 256
"""Smaller pictures are enlarged to so many pixels a side before the region extractor looks at them."""

Decoder = Callable[[np.ndarray], Sequence[Image.Image]]
"""Codes (B, 8, 8) int64 -> B pictures."""


class Seen(NamedTuple):
    """A picture, the sample it belongs to, and its regions; None without a region extractor."""

    number: int
    picture: Image.Image
    regions: Regions | None


class Judged(NamedTuple):
    """What a judge says at the end: figures, and what it cannot give with the reason."""

    metrics: list[Metric]
    absent: dict[str, str]


class Judge(Protocol):
    """Looks at all pictures of a kind, a batch at a time, kind after kind, then says its figures."""

    def look(self, kind: str, seen: Sequence[Seen]) -> None:
        """Take in a batch of a kind, at least one picture."""

    def judged(self) -> Judged:
        """The figures, when all was seen."""


@dataclass
class Gallery:
    """Pictures by kind and sample number. drawn: codes (8, 8) of the generated ones, by sample number."""

    task: Task
    drawn: dict[int, np.ndarray]
    decoder: Decoder

    def picture(self, kind: str, number: int) -> Image.Image | None:
        """None where a sample has no picture of this kind."""
        if kind == GENERATED:
            return self.decode(self.drawn[number])
        if not self.task.split.has["image"][number]:
            return None
        stored = self.task.split.sample(number, jpeg=kind == REAL).pictures[0]
        if kind == TRUE_CODES:
            return None if stored.codes is None else self.decode(stored.codes)
        return None if stored.jpeg is None else Image.open(io.BytesIO(stored.jpeg)).convert("RGB")

    def decode(self, codes_88: np.ndarray) -> Image.Image:
        """The picture that codes (8, 8) stand for."""
        return self.decoder(codes_88[None].astype(np.int64))[0]

    def show(self, judges: Sequence[Judge], extractor: RegionExtractor | None) -> None:
        """Let the judges look at every picture once, each seen by the region extractor once.

        In the order of keys: what a judge draws or halves is the same, whatever the order of the shards.
        """
        ordered = sorted(self.drawn, key=self.task.split.keys.__getitem__)
        for kind, words in KINDS.items():
            with progress(f"look at {words}", total=len(self.drawn), unit="pictures") as bar:
                for first in range(0, len(ordered), self.task.batch):
                    numbers = ordered[first : first + self.task.batch]
                    seen = list(self._seen(kind, numbers, extractor))
                    for judge in judges if seen else ():
                        judge.look(kind, seen)
                    bar.advance(len(numbers))

    def _seen(self, kind: str, numbers: Sequence[int], extractor: RegionExtractor | None) -> Iterator[Seen]:
        for number in numbers:
            picture = self.picture(kind, number)
            if picture is not None:
                yield Seen(number, picture, None if extractor is None else extractor(enlarged(picture)))


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture with its short side at least DETECTOR_SIDE."""
    scale = DETECTOR_SIDE / min(picture.size)
    if scale <= 1:
        return picture
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def squeezed(picture: Image.Image) -> Image.Image:
    """The picture in 64 x 64 pixels, as a code extractor sees it: what generated ones have from the beginning."""
    return picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
