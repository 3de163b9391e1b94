"""What a system reads of stored samples: pixels or features of pictures, speech or none, and so what a sample is to it.

    System --reads--> Reads --present--> which samples have text, image and audio, as far as the system can take them in

A part that a system never reads is not there for it, whatever the shards hold: a model that never heard speech is
measured on spoken pictures by their captions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opt.data.record import Lengths
from opt.data.shards import ShardReader
from opt.systems.system import MODALITIES, System

NOUNS = {"text": "caption", "image": "picture", "audio": "recording"}


@dataclass(frozen=True)
class Reads:
    """What a system takes in. extractors: the kinds of them whose features it reads."""

    pixels: bool = False
    """Whether it looks at pictures as they are stored, and not at features of them."""
    extractors: frozenset[str] = frozenset({"regions", "audio", "codes"})

    def present(self, lengths: Lengths) -> dict[str, np.ndarray]:
        """Which samples have each modality for the system: bool (N,) by name."""
        looked_at = lengths.jpegs if self.pixels else lengths.regions + lengths.codes
        sizes = {"text": lengths.words, "image": looked_at, "audio": lengths.frames}
        return {name: (size > 0) & (not self.unread((name,))) for name, size in sizes.items()}

    def unread(self, modalities: Sequence[str]) -> str:
        """Why the system takes in not all of `modalities`; nothing where it does."""
        known = {
            "text": True, "image": self.pixels or bool(self.extractors & {"regions", "codes"}),
            "audio": "audio" in self.extractors,
        }  # fmt: skip
        lacking = [name for name in MODALITIES if name in modalities and not known[name]]
        return f"the model was trained without {' and '.join(lacking)}" if lacking else ""

    def absent(self, modalities: Sequence[str]) -> str:
        """Why no sample of some shards has all of `modalities`."""
        if reason := self.unread(modalities):
            return reason
        stored = "; the model looks at stored JPEGs" if self.pixels and "image" in modalities else ""
        return f"the shards hold no {' with a '.join(NOUNS[name] for name in modalities)}{stored}"


FEATURES = Reads()
"""Of a system that takes in all that extractors make."""


def reads(system: System) -> Reads:
    """What the system takes in, by its preparer and the widths that it was made for."""
    return Reads(system.preparer().jpeg, system.extractors)


def open_shards(folder: Path, system: System) -> ShardReader:
    """The shards of `folder`. Raises UserError where features that the system reads come from other networks than those
    of its training; what others made of the rest is nothing to it."""
    reader = ShardReader(folder)
    system.require_same(reader.manifest, folder)
    return reader
