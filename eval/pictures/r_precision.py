"""R-precision: does a picture find its own caption among 100? (Xu et al. 2018, AttnGAN, section 4.)

    picture --region extractor--> regions --system.embed--> vector --product--> 1 own caption, 99 of other pictures

The judge is the model that drew: a figure for its agreement with itself, beside the true pictures' own value.
Shape legend: N pictures, C = 100 captions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eval.pictures.gallery import GENERATED, KINDS, Judged, Seen
from eval.ranking import TIE, ranks
from eval.result import Metric, measured
from eval.task import Task
from feature_extract.regions import RegionExtractor
from opt.config import UserError
from opt.data.record import Picture, Sample

NAME = "text_to_image.r_precision"
CAPTIONS = 100


class RPrecision:
    """The judge that searches captions by pictures, with the model's own embeddings."""

    def __init__(self, task: Task, numbers: np.ndarray, extractor: RegionExtractor | None, drawn: str) -> None:
        self.task, self.drawn = task, drawn
        self.vectors: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
        """Unit vectors (E,) of the pictures seen, by kind and sample number."""
        self.reason = "" if extractor else "the shards were made without regions, so the model cannot look at a picture"
        others = task.split.one_a_picture(task.split.with_all(("text",)))
        if len(others) < CAPTIONS:
            self.reason = self.reason or f"needs captions of {CAPTIONS} pictures, the split has those of {len(others)}"
        if self.reason:
            return
        try:
            embed = task.system.embed
            vectors = task.tensor(others, lambda samples: embed(samples, ("text",)), "embed captions")
        except UserError as error:
            self.reason = str(error)
            return
        self.captions = dict(zip(others.tolist(), vectors, strict=True))
        """Unit vectors (E,) of captions, one a picture, by sample number."""
        self.candidates = {number: _candidates(number, others, task.provenance.seed) for number in numbers.tolist()}

    @torch.inference_mode()
    def look(self, kind: str, seen: Sequence[Seen]) -> None:
        if self.reason:
            return
        samples = [_sample(one) for one in seen]
        vectors = self.task.system.embed(samples, ("image",)).float().cpu().numpy()
        self.vectors[kind] |= dict(zip((one.number for one in seen), vectors, strict=True))

    def judged(self) -> Judged:
        if self.reason:
            return Judged([], {NAME: self.reason})
        metrics = [self._metric(kind, vectors) for kind, vectors in self.vectors.items() if vectors]
        missing = [NAME + kind for kind, vectors in self.vectors.items() if not vectors]
        return Judged(metrics, dict.fromkeys(missing, "no picture of this kind"))

    def _metric(self, kind: str, vectors: dict[int, np.ndarray]) -> Metric:
        scores_NC = np.stack([
            np.stack([self.captions[other] for other in self.candidates[number]]) @ vector
            for number, vector in vectors.items()
        ])  # fmt: skip
        own_NC = np.zeros(scores_NC.shape, bool)
        own_NC[:, 0] = True
        return measured(
            NAME + kind,
            (ranks(scores_NC, own_NC, TIE) <= 1).astype(np.float64),
            self.task.provenance.seed,
            chance=1 / CAPTIONS,
            chance_method="random order",
            protocol=f"r-precision/{CAPTIONS}",
            modalities=("text",) if kind == GENERATED else ("image",),
            direction="text -> image",
            candidates=f"{CAPTIONS} captions: its own and {CAPTIONS - 1} drawn of other pictures",
            normaliser="picture through the shards' region extractor; an equal caption first is no hit",
            note="the judge is the model that drew" + (f"; {self.drawn}" if kind == GENERATED else ""),
        )


def _candidates(number: int, others: np.ndarray, seed: int) -> np.ndarray:
    """Samples whose captions a picture searches: (C,), its own first; the same for each kind of picture."""
    random = np.random.default_rng((seed, number))
    return np.concatenate([[number], random.choice(others[others != number], CAPTIONS - 1, replace=False)])


def _sample(seen: Seen) -> Sample:
    """The picture as the model reads it: its regions, as extraction would store them."""
    assert seen.regions is not None
    found = dict(vars(seen.regions))
    picture = Picture(seen.picture.width, seen.picture.height, found.pop("features"), **found)
    return Sample(f"seen-{seen.number}", (picture,))
