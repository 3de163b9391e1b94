"""What the sequences of a batch are asked: targets of masked tokens and of matching, pairs of the alignment.

    Clean        one sample's uncorrupted parts in the tables
    Collected    index and label of every target so far -> Targets, counts and extras of the Batch
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from opt.data.batch import Targets
from opt.data.pack import Part, Place
from opt.data.record import Sample


@dataclass(frozen=True)
class Clean:
    """One sample's uncorrupted parts in the tables, and what of it targets need."""

    sample: Sample
    parts: dict[str, Part]
    alone: dict[str, Place]
    """Single-modality sequences, present when the batch holds them for the alignment."""
    ids: np.ndarray
    """The caption's words, without [CLS] and [SEP]."""

    def length(self, name: str) -> int:
        """Tokens of a modality that can be hidden: [CLS] and [SEP] never are."""
        return len(self.ids) if name == "text" else len(self.parts[name])

    @cached_property
    def writable(self) -> tuple[str, ...]:
        """What a decoder can be asked to write: "text" where there are words, "image" where there are codes."""
        coded = self.sample.pictures and self.sample.pictures[0].codes is not None
        return ("text",) * ("text" in self.parts) + ("image",) * bool(coded)


class Collected:
    """Targets of one batch, in the order they are added."""

    def __init__(self) -> None:
        self.index: dict[str, list[np.ndarray]] = {name: [] for name in ("mlm", "regions", "frames", "match")}
        self.label: dict[str, list[np.ndarray]] = {name: [] for name in self.index}
        self.classes: list[np.ndarray] = []
        self.contrast: list[np.ndarray] = []
        self.contrast_own: list[np.ndarray] = []
        self._contrast_size = 0

    def masked(self, clean: Clean, modality: str, where: np.ndarray, start: int) -> None:
        """Tokens of a modality hidden at `where`, whose first hideable one is flat token `start` of the view."""
        name = {"text": "mlm", "image": "regions", "audio": "frames"}[modality]
        self.index[name].append(start + where)
        if modality == "text":
            self.label[name].append(clean.ids[where])
            return
        entries = clean.parts[modality].entries
        self.label[name].append(entries[where])
        if modality == "image":
            classes = clean.sample.pictures[0].classes
            assert classes is not None
            self.classes.append(classes[where].astype(np.int64))
        else:
            self.contrast.append(entries)
            self.contrast_own.append(self._contrast_size + where)
            self._contrast_size += len(entries)

    def match(self, place: Place, label: int) -> None:
        """A sequence with its five-way label."""
        self.index["match"].append(np.array([place.start]))
        self.label["match"].append(np.array([label]))

    def targets(self) -> dict[str, Targets]:
        """Index and label of each kind, int64 (M,)."""
        return {name: Targets(_joined(self.index[name]), _joined(self.label[name])) for name in self.index}

    def extra(self) -> dict[str, Tensor]:
        """Classes of hidden regions; all frames of recordings with hidden ones, and which are whose."""
        return {
            "region_classes": _joined(self.classes),
            "contrast_frames": _joined(self.contrast),
            "contrast_own": _joined(self.contrast_own),
            "contrast_row": _joined([np.full(len(entries), row) for row, entries in enumerate(self.contrast)]),
            "contrast_row_own": _joined([np.full(len(own), row) for row, own in enumerate(self.contrast_own)]),
        }


def _joined(pieces: list[np.ndarray]) -> Tensor:
    """Pieces end to end as int64 (n,), empty when there are none."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64))
