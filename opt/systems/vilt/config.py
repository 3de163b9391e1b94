"""ViLT's configuration: sizes, rates and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Fixed, Suppress

from opt.data.pixels import Sight
from opt.systems.shared.config import Sizes, require
from opt.systems.shared.tuning import Tuning


@dataclass(frozen=True)
class ViLTConfig:
    """Sizes of the one encoder; rates of corruption; loss weights. Raises UserError for values out of range."""

    sight: Sight = Sight(size=384, patch=32, fit="keep", longest=639, mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
    encoder: Sizes = Sizes()
    hears: bool = False
    """Reads speech too, its frames beside the words (not in the paper)."""
    dropout: float = 0.1
    norm_epsilon: float = 1e-6
    """Added to the variance in all norms; ViT's. Checkpoints of transformers come with 1e-12."""
    text_positions: int = 40
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    most_patches: int = 200
    """Training sees so many patches of a larger picture, drawn anew for each sequence; 0: all."""
    token_rate: float = 0.15
    """Chance of each word to be hidden, with all of its pieces."""
    mlm_weight: float = 1.0
    """Of the hidden words in the loss."""
    match_weight: float = 1.0
    """Of matching in the loss."""
    wpa_weight: float = 0.1
    """Of word-patch alignment in the loss."""
    contrast_weight: float = 0.0
    """Of the contrast of text, picture and speech, each by itself through the encoder: what `embed` needs. Not in the
    paper, where pairs are found by matching all with all."""
    space: int = 256
    """Width of the shared space, where there is a contrast."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        require(self, (
            (("frame_positions", "space"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("most_patches",), "at least 1, or 0 for all", lambda value: value >= 0),
            (("norm_epsilon",), "above 0", lambda value: value > 0),
            (("dropout",), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("token_rate",), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("mlm_weight", "match_weight", "wpa_weight", "contrast_weight"), "at least 0", lambda value: value >= 0),
            (("sight_least_area",), "1: a picture that is matched with several texts is the same for all",
             lambda value: value == 1),
        ))

    @property
    def sight_least_area(self) -> float:
        """Of `sight`."""
        return self.sight.least_area

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities, in the order in which they stand in a sequence."""
        return ("text", "audio", "image") if self.hears else ("text", "image")
