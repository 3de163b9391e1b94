"""Sizes of ViLEM's parts, and what is edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opt.data.pixels import Sight
from opt.systems.shared.config import Sizes, require
from opt.systems.system import Progress


@dataclass(frozen=True)
class ViLEMConfig:
    """Sizes of towers and editor, and how mistakes are made. Raises UserError for values out of range."""

    sight: Sight = Sight(size=224, patch=16)
    image: Sizes = Sizes()
    text: Sizes = Sizes(layers=6)
    """Of the text tower's lower layers, which read edited texts, too; and but for the number of layers of the upper
    ones."""
    upper_layers: int = 6
    """Layers behind those, of texts that are searched only."""
    audio: Sizes = Sizes()
    """Of the speech tower, where it hears."""
    hears: bool = False
    """Has a tower for speech: the contrast of all three pairs, and words that were not spoken (not in the paper)."""
    edits: Literal["one", "all", "none"] = "one"
    """Before the editor proposes a word for a place that place is masked by itself, or all edited places of a text at
    once, which is cheaper; none: nothing is edited, and contrast alone is learned."""
    editor: Sizes = Sizes()
    """Of the masked language model that edits."""
    editor_share: float = 0.2
    """Share of training over which the editor learns to fill masks in the captions, while it edits already (as the
    generator of ELECTRA, arXiv 2003.10555); then it is frozen. 0: it is BERT's, by --start bert:FOLDER, and frozen."""
    token_rate: float = 0.15
    """Chance of each word to be edited."""
    most_edits: int = 8
    """In one text."""
    candidates: int = 20
    """Likeliest words among which the editor draws."""
    beta: float = 0.2
    """Weight of the global branch; the local one has the rest of 1."""
    space: int = 256
    """Width of the shared space."""
    text_positions: int = 30
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    dropout: float = 0.1
    """In the text tower."""
    momentum: float = 0.995
    """Share of the twin that stays in each step."""
    ring_rows: int = 65_536
    """Earlier samples whose keys are kept as negatives of the contrast."""
    distillation: float = 0.4
    """Share of the contrast's targets that is what the twin believes; 0: none."""
    ramp: float = 0.05
    """Share of training over which distillation rises from 0: one epoch of twenty."""

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions", "upper_layers", "ring_rows", "most_edits", "candidates"), "at least 1",
             lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("dropout",), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("token_rate", "momentum", "distillation", "beta", "editor_share"), "from 0 to 1",
             lambda value: 0 <= value <= 1),
            (("ramp",), "above 0 and at most 1", lambda value: 0 < value <= 1),
        ))

    def alpha(self, progress: Progress) -> float:
        """The share of the contrast's targets that the twin's beliefs are by now."""
        return self.distillation * min(1.0, progress.fraction / self.ramp)
