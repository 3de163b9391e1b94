"""CLIP (arXiv 2103.00020): a picture and its caption, each through a tower of its own, meet in one space only.

    text   [BOS] words [EOS] --causal Stack--> [EOS]  --Projection--> (B, E) \\
    image  [class] patches   --------- Stack--> [class] --Projection--> (B, E)  > contrast of each pair of modalities
    audio  [class] frames    --------- Stack--> [class] --Projection--> (B, E) /     (where it hears)

Shape legend: S sequences, E shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from opt.data.batch import Batch
from opt.data.pixels import Sight
from opt.data.tokenizer import Tokenizer
from opt.nn.block import Activation, Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Projection, Temperature
from opt.nn.init import by_width
from opt.nn.states import States
from opt.nn.towers import Tower
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes, require
from opt.systems.shared.pairs import contrasts
from opt.systems.shared.rows import TowerRows
from opt.systems.shared.towers import TowerSystem
from opt.systems.system import DataFacts, Output, Preset, Progress


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the towers. Raises UserError for values out of range."""

    sight: Sight = Sight(size=224, patch=16, fit="crop")
    image: Sizes = Sizes()
    text: Sizes = Sizes(width=512, heads=8, inner=2048)
    audio: Sizes = Sizes(width=512, heads=8, inner=2048)
    """Of the speech tower, where it hears."""
    hears: bool = False
    """Has a tower for speech, and the contrast of all three pairs of modalities (not in the paper)."""
    space: int = 512
    """Width of the shared space."""
    text_positions: int = 77
    """Longest text in tokens, [BOS] and [EOS] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    activation: Activation = "gelu"
    """Of the feed-forwards; OpenAI's weights were made with quick_gelu."""
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [BOS], a word, [EOS]", lambda value: value >= 3),
            (("norm_epsilon",), "above 0", lambda value: value > 0),
        ))


def base() -> Preset:
    """ViT-B/16 and the paper's recipe, at a batch that one machine holds (the paper's has 32,768 pairs)."""
    return Preset(
        CLIPConfig(),
        LoopConfig(steps=100_000, batch_tokens=65_536, workers=8, save_every=1000),
        OptimConfig(learning_rate=5e-4, warmup=0.02, beta2=0.98, weight_decay=0.2),
        vocabulary_size=49_408,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return Preset(CLIPConfig(TINY_SIGHT, TINY, TINY, TINY, space=128, text_positions=64),
                  LoopConfig(batch_tokens=16_384))


def trimodal() -> Preset:
    """`tiny` with a tower for speech."""
    return Preset(CLIPConfig(TINY_SIGHT, TINY, TINY, TINY, hears=True, space=128, text_positions=64),
                  LoopConfig(batch_tokens=16_384))


class Rows(TowerRows):
    """Captions stand between [BOS] and [EOS]."""

    def sequence(self, ids: np.ndarray) -> np.ndarray:
        """[BOS] words [EOS]."""
        return np.concatenate([[self.tokenizer.bos], ids, [self.tokenizer.eos]])


class CLIP(TowerSystem):
    """Contrastive Language-Image Pre-training."""

    name = "clip"
    config_type = CLIPConfig

    def __init__(self, config: CLIPConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        text, epsilon = config.text, config.norm_epsilon
        self.towers = nn.ModuleDict({
            "text": Tower(TextEmbedder(tokenizer.size, config.text_positions, text.width, 0.0, bare=True),
                          self._stack(text, causal=True)),
            "image": Tower(PatchEmbedder(config.sight, config.image.width, bias=False, first_norm=True,
                                         epsilon=epsilon), self._stack(config.image)),
        })
        sizes = {"text": text, "image": config.image}
        if config.hears:
            sizes["audio"] = config.audio
            frames = FrameEmbedder(max(facts.speech_width, 1), config.frame_positions, config.audio.width, 0.0,
                                   epsilon, first=True, masks=False)
            self.towers["audio"] = Tower(frames, self._stack(config.audio))
        self.project = nn.ModuleDict({name: Projection(each.width, config.space) for name, each in sizes.items()})
        self.temperature = Temperature()
        self.apply(by_width)

    def preparer(self) -> Rows:
        """Samples -> a sequence a modality."""
        return Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Each modality by itself, then the contrast of each pair."""
        vectors = {name: self.vector(name, self.encode(name, batch)) for name in self.modalities}
        return Output(contrasts(lambda name, rows: vectors[name][rows], self.modalities, batch, self.temperature()))

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps the temperature in its range."""
        self.temperature.clamp()

    def vector(self, modality: str, states: States) -> Tensor:
        """By what sums it up: (S, E)."""
        return self.project[modality](self.summary(modality, states))

    def summary(self, modality: str, states: States) -> Tensor:
        """The last word's state, [EOS], which alone has seen all words; the first of patches or frames."""
        return states.last if modality == "text" else states.first

    def _stack(self, sizes: Sizes, causal: bool = False) -> Stack:
        return Stack(sizes.layers, sizes.width, sizes.heads, sizes.inner, 0.0, causal=causal,
                     epsilon=self.config.norm_epsilon, activation=self.config.activation)
