"""BLIP's networks: the text network in its three functions, the towers beside it, and what the twin follows.

Shape legend: N packed tokens, S sequences, P sequences onto contexts, W width, E shared space.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from opt.data.batch import Batch, TextTable, View
from opt.nn.block import Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Projection
from opt.nn.states import States, onto
from opt.nn.towers import Tower
from opt.systems.blip.config import BLIPConfig


class TextNetwork(nn.Module):
    """Words, and the stack whose three functions share everything but self-attention."""

    def __init__(self, config: BLIPConfig, vocabulary: int) -> None:
        super().__init__()
        text = config.text
        self.embedder = TextEmbedder(vocabulary, config.text_positions, text.width, config.dropout, config.text_epsilon)
        self.stack = Stack(text.layers, text.width, text.heads, text.inner, config.dropout, post_norm=True, cross=True,
                           epsilon=config.text_epsilon, context_width=config.image.width, writing=True)

    def forward(self, text: TextTable, view: View) -> States:
        """A view's sequences, read by themselves."""
        return States.of(self.stack(self._entries(text, view, text.ids[view.gather]), view.layout), view)

    def words(self, text: TextTable, view: View, first: int) -> States:
        """A view's sequences before the stack, with the token `first` at their beginning."""
        return States.of(self._entries(text, view, text.ids[view.gather].index_fill(0, view.first, first)), view)

    def onto(self, words: States, context: States, rows: np.ndarray, writing: bool = False) -> States:
        """Words of P sequences that look at the contexts `rows` (P,); writing: each sees the past alone."""
        layout = onto(words.lengths, context.lengths, words.hidden.device, rows)
        return States(self.stack(words.hidden, words.layout, context.hidden, layout, writing), words.lengths)

    def _entries(self, text: TextTable, view: View, ids_N: Tensor) -> Tensor:
        return self.embedder.at(ids_N, text.positions[view.gather])


class Encoders(nn.Module):
    """Each modality by itself, and its vector in the shared space: what the twin is a twin of."""

    def __init__(self, config: BLIPConfig, vocabulary: int, speech_width: int) -> None:
        super().__init__()
        image, epsilon = config.image, config.image_epsilon

        def tower(embedder: nn.Module) -> Tower:
            return Tower(embedder, Stack(image.layers, image.width, image.heads, image.inner, 0.0, epsilon=epsilon))

        self.towers = nn.ModuleDict({"text": TextNetwork(config, vocabulary),
                                     "image": tower(PatchEmbedder(config.sight, image.width))})
        if config.hears:
            self.towers["audio"] = tower(FrameEmbedder(max(speech_width, 1), config.frame_positions, image.width, 0.0,
                                                       epsilon, first=True, masks=False))
        self.project = nn.ModuleDict({
            name: Projection(config.text.width if name == "text" else image.width, config.space, bias=True)
            for name in self.towers
        })

    def forward(self, modality: str, batch: Batch) -> tuple[States, Tensor]:
        """The sequences of one modality, and their unit vectors (S, E)."""
        states = self.read(modality, batch)
        return states, self.vectors(modality, states)

    def read(self, modality: str, batch: Batch) -> States:
        """The sequences of one modality, read by themselves."""
        return self.towers[modality](batch.table(modality), batch.views[modality])

    def vectors(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.project[modality](states.first)
