"""BEiT-3's configuration: sizes, sharing, rates and the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress

from opt.data.pixels import Sight
from opt.recipe import Stage
from opt.systems.shared.config import Sizes, require
from opt.systems.shared.stages import Needs, require_stage
from opt.systems.shared.tuning import Tuning

NEEDS = {"masked": Needs(), "contrast": Needs(least=2)}
"""What a stage may ask for."""
OBJECTIVES = tuple(NEEDS)


@dataclass(frozen=True)
class BEiT3Config:
    """Sizes of the one transformer and its experts; rates of what is hidden. Raises UserError for values out of range.
    """

    sight: Sight = Sight(size=224, patch=16, fit="squeeze", mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
    encoder: Sizes = Sizes()
    hears: bool = False
    """Reads speech too, with an expert of its own (not in the paper)."""
    sharing: Literal["paper", "code"] = "paper"
    """paper: attention is shared, each modality has its own feed-forward, and several together have one in the
    uppermost layers (section 2.1). code: every projection and norm is each modality's own, and none is for several
    together (the authors' published code and weights)."""
    fused_layers: int = 3
    """Uppermost layers with a feed-forward for several modalities together, with sharing paper."""
    norm_epsilon: float = 1e-5
    text_positions: int = 64
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    image_rate: float = 0.4
    """Share of patches hidden, in blocks."""
    text_rate: float = 0.15
    """Chance of each word of a text by itself to be hidden."""
    fused_text_rate: float = 0.5
    """The same of a text beside a picture or speech."""
    speech_rate: float = 0.5
    """Chance of each frame of speech to be hidden; wav2vec 2.0 hides 0.49."""
    frame_span: int = 4
    """Hidden frames come in runs of so many: neighbouring frames give each other away."""
    speech_targets: Literal["auto", "codes", "features"] = "auto"
    """What hidden frames are predicted as: their codes (of the speech network's quantiser, or of `opt shards units`),
    or their features, by squared distance. auto: codes where the shards hold them."""
    space: int = 768
    """Width of the space that the contrast makes."""
    contrast_weight: float = 1.0
    """Of each contrast in the loss; hidden words, patches and frames count 1 each, by themselves and beside others."""
    caption_rate: float = 0.7
    """Tuned for captions: chance of each word, and of the end, to be hidden."""
    caption_smoothing: float = 0.1
    """Tuned for captions: share of the target that is spread over all words."""
    stage: Stage = Stage()
    """What is shown, asked and moved: objectives masked and contrast; none named is both."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        rates = ("image_rate", "text_rate", "fused_text_rate", "speech_rate", "caption_rate")
        require(self, (
            (("frame_positions", "frame_span", "space"), "at least 1", lambda value: value >= 1),
            (("fused_layers",), f"from 0 to the {self.encoder.layers} layers",
             lambda value: 0 <= value <= self.encoder.layers),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("norm_epsilon", "contrast_weight"), "above 0", lambda value: value > 0),
            (rates, "above 0 and at most 1", lambda value: 0 < value <= 1),
            (("caption_smoothing",), "at least 0 and below 1", lambda value: 0 <= value < 1),
        ))
        require_stage(self.stage, NEEDS, self.reads)

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities, in the order in which they stand in a sequence: pictures first."""
        return ("image", "text", "audio") if self.hears else ("image", "text")

    @property
    def asks(self) -> tuple[str, ...]:
        """The stage's objectives."""
        return self.stage.objectives or OBJECTIVES
