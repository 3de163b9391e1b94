"""BLIP's configuration: sizes and weights of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Fixed, Suppress

from opt.data.pixels import Sight
from opt.systems.shared.config import Sizes, require
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes and weights of the parts. Raises UserError for values out of range."""

    sight: Sight = Sight(size=224, patch=16)
    image: Sizes = Sizes()
    """Of the tower for pictures, and of that for speech where it hears: words look at both."""
    text: Sizes = Sizes()
    hears: bool = False
    """Has a tower for speech: a second source of cross-attention, and all three pairs in the contrast (not in the
    paper)."""
    space: int = 256
    """Width of the shared space."""
    text_positions: int = 30
    """Longest text in tokens, special ones and the prompt included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    dropout: float = 0.1
    """Of the text network."""
    image_epsilon: float = 1e-6
    text_epsilon: float = 1e-12
    """Of the norms; each as the authors have it."""
    contrast_weight: float = 1.0
    match_weight: float = 1.0
    language_weight: float = 1.0
    """Weights of the three objectives; 0 turns one off: 0, 0, 1 tunes a captioner, 1, 1, 0 a filter (docs/capfilt.md).
    """
    smoothing: float = 0.1
    """Share of the target of each written word that is spread over all words."""
    prompt: str = ""
    """What every text begins with that is written, such as "a picture of "; it is given, not learned."""
    momentum: float = 0.995
    """Share of the twin that stays in each step."""
    ring_rows: int = 57_600
    """Earlier samples whose keys are kept as negatives of the contrast."""
    distillation: float = 0.4
    """Share of the contrast's target that the twin believes, after the ramp."""
    ramp: float = 0.1
    """Share of the steps in which `distillation` rises from 0 (the authors: 2 of 20 epochs)."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions", "ring_rows"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("contrast_weight", "match_weight", "language_weight"), "at least 0", lambda value: value >= 0),
            (("momentum", "distillation"), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("ramp",), "above 0 and at most 1", lambda value: 0 < value <= 1),
            (("dropout", "smoothing"), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("image_epsilon", "text_epsilon"), "above 0", lambda value: value > 0),
        ))

    def alpha(self, progress: Progress) -> float:
        """The share of the contrast's target that the twin believes by now."""
        return self.distillation * min(1.0, progress.fraction / self.ramp)
