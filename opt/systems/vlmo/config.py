"""VLMo's configuration: sizes, experts, rates, and what a stage of its training asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress

from opt.data.pixels import Sight
from opt.nn.multiway import KINDS, Switch
from opt.recipe import Stage
from opt.systems.shared.config import Sizes, require
from opt.systems.shared.stages import Needs, require_stage
from opt.systems.shared.tuning import Tuning

CONTRAST, MATCH, WORDS, PATCHES = OBJECTIVES = ("contrast", "match", "mlm", "mim")
"""Pictures, texts and recordings each by itself; texts beside pictures and recordings; hidden words; hidden patches."""
NEEDS = {CONTRAST: Needs(least=2), MATCH: Needs(("text",), 2), WORDS: Needs(("text",)), PATCHES: Needs(("image",))}

VISION = Stage("vision", ("image",), (PATCHES,), ("*.image*", "stack.*_scale", "*.shared.*", "code_head.*"), 0.25)
"""Attention learns here, with the expert of pictures."""
LANGUAGE = Stage("language", ("text",), (WORDS,), ("*.text*", "word_head.*"), 0.25)
"""Attention stays as pictures made it: only what is the words' own learns (section 3.3)."""
PAIRS = Stage("pairs", ("text", "image", "audio"), (CONTRAST, MATCH, WORDS), ("*",), 0.5)
"""Everything learns. Speech has no stage of its own: its expert begins here."""


@dataclass(frozen=True)
class VLMoConfig:
    """Sizes of the one transformer; rates of corruption; loss weights. Raises UserError for values out of range."""

    sight: Sight = Sight(size=224, patch=16, mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
    encoder: Sizes = Sizes()
    experts: bool = True
    """Feed-forwards and their norms switched by modality; without, all modalities share one."""
    fused_layers: int = 2
    """Layers, the last ones, in which tokens of fused sequences have one expert together, whatever their modality."""
    positions: Literal["relative", "absolute"] = "relative"
    """relative: attention knows how far apart two tokens are (the authors' code). absolute: learned places are added to
    what enters (the paper)."""
    layer_scale: float = 0.1
    """What the learned factors of residual sums begin with."""
    hears: bool = False
    """Has an expert of speech: a context beside the picture, and the contrast of all three pairs (not in the paper)."""
    contrasts: Literal["paper", "code"] = "paper"
    """paper: of what each modality is by itself. code: also of what it is behind the fused experts, half each."""
    space: int = 768
    """Width of the shared space."""
    norm_epsilon: float = 1e-6
    """Added to the variance in all norms; ViT's."""
    text_positions: int = 40
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    token_rate: float = 0.15
    """Chance of each word to be hidden, with all of its pieces."""
    patch_rate: float = 0.4
    """Share of a picture that is hidden, in blocks."""
    mlm_weight: float = 0.25
    """Of the hidden words in the loss, beside contrast and matching; by themselves they count whole."""
    stage: Stage = PAIRS
    """What this run shows, asks and trains."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        require(self, (
            (("frame_positions", "space"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("fused_layers",), f"from 1 to {self.encoder.layers}, the layers there are",
             lambda value: 1 <= value <= self.encoder.layers),
            (("norm_epsilon", "layer_scale"), "above 0", lambda value: value > 0),
            (("token_rate", "patch_rate"), "above 0 and at most 1", lambda value: 0 < value <= 1),
            (("mlm_weight",), "at least 0", lambda value: value >= 0),
        ))
        require_stage(self.stage, NEEDS, self.reads)

    @property
    def asks(self) -> tuple[str, ...]:
        """The objectives of the stage; of a model tuned for questions none."""
        return (self.stage.objectives or OBJECTIVES) if self.tuning.task == "pretraining" else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities, in the order in which they stand in a sequence."""
        return ("text", "image", "audio") if self.hears else ("text", "image")

    @property
    def switches(self) -> list[Switch]:
        """Of each layer: experts of the modalities, and on top one for the tokens of fused sequences. A kind of token
        that never comes goes where text goes."""
        if not self.experts:
            return [Switch({}, {})] * self.encoder.layers
        modality = {kind: kind.removeprefix("fused ") for kind in KINDS}
        lower = {kind: name if name in self.reads else "text" for kind, name in modality.items()}
        upper = {kind: "fused" if kind.startswith("fused") else name for kind, name in lower.items()}
        below = self.encoder.layers - self.fused_layers
        return [Switch(lower, {})] * below + [Switch(upper, {})] * self.fused_layers
