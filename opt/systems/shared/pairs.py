"""Pairs: text, picture and speech of one sample close in one space, all three pairs, whoever encodes them.

    rows of a batch --alignment_pairs--> "align_text_image", ... --contrasts--> a Term for each pair of modalities

Shape legend: B samples, n of them with both modalities, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opt.data.batch import Batch
from opt.data.pack import Place
from opt.data.record import Sample
from opt.data.stored import key_hash
from opt.objectives.contrastive import in_batch
from opt.objectives.term import Term

PAIRS = (("text", "image"), ("text", "audio"), ("image", "audio"))


class Row(Protocol):
    """A row of a batch: its sample, and the sequence of each modality by itself."""

    @property
    def sample(self) -> Sample: ...

    @property
    def alone(self) -> Mapping[str, Place]: ...


def picture_number(sample: Sample) -> int:
    """A number that means the same picture in every process: 63 bits of its key's hash."""
    return int(key_hash(sample.key)) >> 1


def alignment_pairs(rows: Sequence[Row]) -> dict[str, Tensor]:
    """For each pair of modalities, int64 (n, 3): the two sequences of each sample that has both, and its picture."""
    pairs = {}
    for first, second in PAIRS:
        both = [row for row in rows if first in row.alone and second in row.alone]
        pairs[f"align_{first}_{second}"] = torch.tensor(
            [[row.alone[first].number, row.alone[second].number, picture_number(row.sample)] for row in both],
            dtype=torch.int64,
        ).reshape(-1, 3)
    return pairs


def contrasts(
    vectors: Callable[[str, Tensor], Tensor], modalities: Sequence[str], batch: Batch, scale: Tensor,
    weight: float = 1.0,
) -> dict[str, Term]:
    """In-batch contrast of each pair of `modalities` over all ranks (CLIP, section 2.3), each a term of `weight`.

    vectors: unit vectors (n, E) of a modality's sequences by their numbers (n,). A row has at most one pair of a kind.
    """
    terms = {}
    for first, second in PAIRS:
        if first in modalities and second in modalities:
            name = f"align_{first}_{second}"
            first_B, second_B, picture_B = batch.extra[name].unbind(1)
            terms[name] = in_batch(vectors(first, first_B), vectors(second, second_B), picture_B, scale,
                                   batch.counts[name], len(batch.keys), weight)
    return terms
