"""Towers as ALBEF, COTS and ViLEM have them: BERT's layers for words, a ViT for pictures, one more for speech.

A configuration has `text`, `image` and `audio` (`Sizes`), `sight`, `text_positions`, `frame_positions`, `dropout` and
`hears`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from opt.nn.block import Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.towers import Tower
from opt.systems.shared.config import Sizes

TEXT_EPSILON, VISION_EPSILON = 1e-12, 1e-6
"""Added to the variance in norms: BERT's, and ViT's."""


def towers(config: Any, words: int, speech_width: int, text: Stack | None = None, masks: bool = False) -> nn.ModuleDict:
    """A tower for each modality that is read. text: the stack of words, where it is none of its own alone. masks:
    patches can be hidden."""
    made = {
        "text": Tower(TextEmbedder(words, config.text_positions, config.text.width, config.dropout, TEXT_EPSILON),
                      text or bert(config, config.text.layers)),
        "image": Tower(PatchEmbedder(config.sight, config.image.width, epsilon=VISION_EPSILON, masks=masks),
                       vit(config.image)),
    }
    if config.hears:
        frames = FrameEmbedder(max(speech_width, 1), config.frame_positions, config.audio.width, 0.0, VISION_EPSILON,
                               first=True, masks=False)
        made["audio"] = Tower(frames, vit(config.audio))
    return nn.ModuleDict(made)


def bert(config: Any, layers: int, cross: bool = False) -> Stack:
    """Post-norm layers of words. cross: they may look at states of the picture's width."""
    sizes = config.text
    return Stack(layers, sizes.width, sizes.heads, sizes.inner, config.dropout, post_norm=True, cross=cross,
                 epsilon=TEXT_EPSILON, context_width=config.image.width)


def vit(sizes: Sizes) -> Stack:
    """Pre-norm layers."""
    return Stack(sizes.layers, sizes.width, sizes.heads, sizes.inner, 0.0, epsilon=VISION_EPSILON)
