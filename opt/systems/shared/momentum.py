"""Momentum contrast over three modalities: each pair against what a twin says of the batch and of earlier samples.

    vectors of sequences --rows of the batch--> (B, E), zeros where absent --gathered--> keys of all ranks + ring
    online, keys --momentum_contrast--> a Term for each pair of modalities;  carry --after_step: push--> ring

Shape legend: B rows of this rank, K rows of all ranks, C keys: those K, then the ring's; S sequences, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import Batch
from opt.distributed import gather_rows, interleaved, world
from opt.nn.heads import Temperature
from opt.nn.momentum import Ring
from opt.objectives.contrastive import NO_PICTURE, momentum_contrast
from opt.objectives.term import Term
from opt.systems.shared.pairs import PAIRS
from opt.systems.system import MODALITIES


@dataclass(frozen=True)
class Compared:
    """Both sides of a contrast, by modality, zeros where it is absent. online (B, E): the model's vectors. own
    (B, ...): the twin's, and of the same rows "has_*" and "picture". of_ranks (K, ...): these of all ranks; keys
    (C, ...): those, then the ring's."""

    online: dict[str, Tensor]
    own: dict[str, Tensor]
    of_ranks: dict[str, Tensor]
    keys: dict[str, Tensor]


@dataclass(frozen=True)
class Contrasted:
    """What a contrast of a batch found. terms: a pair of modalities each. online (B, E), keys (K, E): vectors by
    modality, zeros where absent; key_picture (K,): the keys' pictures. carry (K, ...): what goes into the ring."""

    terms: dict[str, Term]
    online: dict[str, Tensor]
    keys: dict[str, Tensor]
    key_picture: Tensor
    carry: dict[str, Tensor]


class MomentumContrast(nn.Module):
    """The ring, the temperature and the terms (ALBEF, section 3.2 and 3.3; BLIP, section 3.2).

    modalities: those of the system. space: width of the shared space. rows: of the ring, which begins empty.
    """

    def __init__(self, modalities: Sequence[str], space: int, rows: int) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.temperature = Temperature(0.07, 0.001, 0.5)
        fields = {name: torch.zeros(space) for name in self.modalities}
        flags = {f"has_{name}": torch.tensor(False) for name in self.modalities}
        self.ring = Ring(rows, {**fields, **flags, "picture": torch.tensor(NO_PICTURE)})

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of modalities that are contrasted."""
        return [(a, b) for a, b in PAIRS if a in self.modalities and b in self.modalities]

    def forward(
        self, vectors: Mapping[str, Tensor], kept: Mapping[str, Tensor], batch: Batch, alpha: float
    ) -> Contrasted:
        """vectors, kept: unit vectors (S, E) of each modality's sequences, by the model and by its twin. alpha: share
        of the targets that are the twin's beliefs."""
        compared = self.compare(vectors, kept, batch)
        terms = {f"align_{a}_{b}": self.term(compared, a, b, both(compared.own, a, b), batch.counts[f"align_{a}_{b}"],
                                             alpha) for a, b in self.pairs}
        of_ranks = compared.of_ranks
        keys = {name: of_ranks[name] for name in self.modalities}
        return Contrasted(terms, compared.online, keys, of_ranks["picture"], of_ranks)

    def compare(self, vectors: Mapping[str, Tensor], kept: Mapping[str, Tensor], batch: Batch) -> Compared:
        """What the vectors of `forward` are to be found among."""
        picture_B, ring = batch.extra["picture"], self.ring.fields()
        rows = {name: batch.host["rows"][:, MODALITIES.index(name)] for name in self.modalities}
        online = {name: by_row(vectors[name], rows[name]) for name in self.modalities}
        own: dict[str, Tensor] = {"picture": picture_B}
        for name in self.modalities:
            own[name] = by_row(kept[name], rows[name]).detach()
            own[f"has_{name}"] = torch.from_numpy(rows[name] >= 0).to(picture_B.device)
        of_ranks = {name: gathered(value) for name, value in own.items()}
        keys = {name: torch.cat([of_ranks[name], ring[name]]) for name in of_ranks}
        return Compared(online, own, of_ranks, keys)

    def term(
        self, compared: Compared, a: str, b: str, asked_B: Tensor, count: Tensor, alpha: float, weight: float = 1.0
    ) -> Term:
        """The contrast of two modalities: what rows `asked_B`, which have both, add to it."""
        online, own, keys = compared.online, compared.own, compared.keys
        return momentum_contrast(
            online[a], online[b], own[a], own[b], keys[a], keys[b], asked_B, keys[f"has_{a}"], keys[f"has_{b}"],
            own["picture"], keys["picture"], self.temperature(), alpha, count, weight,
        )  # fmt: skip

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Takes the step's rows into the ring, those of all ranks and micro-batches in the order of the plan, and keeps
        the temperature in its range."""
        new = {name: interleaved(torch.cat([interleaved(carry[name], world()) for carry in carries]), len(carries))
               for name in self.ring.names}
        self.ring.push(new, kept)
        self.temperature.clamp()


def both(rows: Mapping[str, Tensor], a: str, b: str) -> Tensor:
    """Which of the rows have both modalities: bool (rows,)."""
    return rows[f"has_{a}"] & rows[f"has_{b}"]


def by_row(vectors_SE: Tensor, rows: np.ndarray) -> Tensor:
    """The vectors of the sequences `rows` (B,), zeros where it is ABSENT: (B, E)."""
    index = torch.from_numpy(np.where(rows < 0, len(vectors_SE), rows)).to(vectors_SE.device)
    return nn.functional.embedding(index, nn.functional.pad(vectors_SE, (0, 0, 0, 1)))


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, which have equally many, by rank; exact gradients. Booleans stay such."""
    if rows.dtype == torch.bool:
        return gather_rows(rows.to(torch.uint8), len(rows)).bool()
    return gather_rows(rows, len(rows))
