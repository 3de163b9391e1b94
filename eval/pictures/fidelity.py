"""FID and KID of generated pictures against the true ones of the same captions, one pair of figures a network.

Two figures beside tell how to read them: the true pictures decoded from their own codes against the true ones, which is
what the codes lose, and one half of the true pictures against the other, which is what chance alone makes.
Shape legend: N pictures, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.pictures.distances import SUBSETS, Moments, frechet_distance, kernel_distance
from eval.pictures.gallery import GENERATED, KINDS, REAL, TRUE_CODES, Judged, Seen
from eval.pictures.networks import HOW_TO_GET, PictureNetwork
from eval.result import Metric

ENOUGH_FOR_FID = 10_000
KEPT_FOR_KID = 10_000
"""The features of so many pictures a kind are kept: subsets are drawn among them."""
JOINED = 512
"""Pictures that enter the moments at once: a pass over a covariance of 2,048 x 2,048 is dear."""


class Features:
    """What is kept of one kind's features: the first of them, and moments; of true pictures, moments of two halves."""

    def __init__(self, kind: str, width: int) -> None:
        self.kept: list[np.ndarray] = []
        self._parts = [Moments(width) for _ in range(2 if kind == REAL else 1)]
        """Pictures at even places and at odd ones, or all."""
        self._waiting: list[np.ndarray] = []

    def add(self, features_ND: np.ndarray) -> None:
        """Take in more pictures."""
        if (room := KEPT_FOR_KID - self.count) > 0:
            self.kept.append(features_ND[:room])
        self._waiting.append(features_ND)
        if sum(map(len, self._waiting)) >= JOINED:
            self._join()

    @property
    def count(self) -> int:
        return sum(part.count for part in self._parts) + sum(map(len, self._waiting))

    def whole(self) -> Moments:
        """The moments of all pictures."""
        first, *more = self.halves()
        return first.joined(more[0]) if more else first

    def halves(self) -> list[Moments]:
        """The moments of each half, where there are two."""
        self._join()
        return self._parts

    def _join(self) -> None:
        if self._waiting:
            features_ND, self._waiting = np.concatenate(self._waiting), []
            start, parts = self.count, len(self._parts)
            for place, part in enumerate(self._parts):
                if len(mine := features_ND[(place - start) % parts :: parts]):
                    part.add(mine)


@dataclass
class Fidelity:
    """The judge of one network: FID and KID."""

    network: PictureNetwork
    seed: int
    drawn: str
    """How the generated pictures were drawn."""
    features: dict[str, Features] = field(default_factory=dict)

    def look(self, kind: str, seen: Sequence[Seen]) -> None:
        kept = self.features.setdefault(kind, Features(kind, self.network.width))
        kept.add(self.network.features([one.picture for one in seen]))

    def judged(self) -> Judged:
        metrics: list[Metric] = []
        absent: dict[str, str] = {}
        for kind in KINDS:
            some = self.features.get(kind)
            real = self.features.get(REAL)
            fewest = min(some.count if some else 0, real.count if real else 0)
            if some is None or real is None or fewest < (4 if kind != REAL else 8):
                reason = f"too few pictures: {fewest} of this kind and its true ones"
                absent |= {self._name(metric, kind): reason for metric in ("fid", "kid")}
                continue
            metrics += [self._frechet(kind, some, real), self._kernel(kind, some, real)]
        return Judged(metrics, absent)

    def _name(self, metric: str, kind: str) -> str:
        return f"text_to_image.{metric}_{self.network.name}{kind}"

    def _frechet(self, kind: str, some: Features, real: Features) -> Metric:
        one, other = real.halves() if kind == REAL else (some.whole(), real.whole())
        few = min(one.count, other.count) < ENOUGH_FOR_FID
        return Metric(
            self._name("fid", kind),
            frechet_distance(other, one),
            one.count,
            protocol=f"fid/{self.network.name}",
            note=f"{self.network.about}; float64; no interval, for resampling raises it"
            + (f"; below {ENOUGH_FOR_FID:,} pictures it is too high, the more so the fewer: read KID" if few else "")
            + self._how(kind),
            **self._about(kind, one.count, other.count),
        )

    def _kernel(self, kind: str, some: Features, real: Features) -> Metric:
        true_ND = np.concatenate(real.kept)
        one_ND, other_ND = (true_ND[::2], true_ND[1::2]) if kind == REAL else (np.concatenate(some.kept), true_ND)
        found = kernel_distance(one_ND, other_ND, self.seed)
        return Metric(
            self._name("kid", kind),
            found.value,
            len(one_ND),
            found.interval,
            protocol=f"kid/{self.network.name}",
            note=f"{self.network.about}; mean over {SUBSETS} subsets of {found.size} of each, their standard deviation "
            f"{found.deviation:.2g}{self._how(kind)}",
            **self._about(kind, len(one_ND), len(other_ND)),
        )

    def _how(self, kind: str) -> str:
        return f"; {self.drawn}" if kind == GENERATED else ""

    def _about(self, kind: str, some: int, real: int) -> dict[str, Any]:
        what = {
            GENERATED: f"{some:,} generated against {real:,} true pictures of the same captions",
            TRUE_CODES: f"{some:,} true pictures decoded from their codes against the {real:,} true ones",
            REAL: f"{some:,} true pictures against {real:,} other true ones",
        }
        return {
            "unit": "score",
            "better": "lower",
            "modalities": ("text",) if kind == GENERATED else ("image",),
            "direction": "text -> image",
            "candidates": what[kind],
            "normaliser": f"all pictures squeezed to 64 x 64 (bicubic), then {self.network.resize}",
        }


def without_inception() -> dict[str, str]:
    """Why the figures by the Inception of FID are absent where it was not asked for."""
    return {f"text_to_image.{metric}_inception": HOW_TO_GET for metric in ("fid", "kid")}
