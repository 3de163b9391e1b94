"""The editor: a masked language model that sees nothing but words, and so proposes what a text might say instead.

    texts with [MASK] --TextEmbedder--> post-norm Stack --the masked places--> TokenHead --> logits (M, V)

It is BERT's kind, so that a BERT may fill it (opt/weights/bert.py). It never drops out: what it proposes for a place
depends on the words around it alone.
Shape legend: N tokens, M masked places, V vocabulary, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from opt.data.batch import TextTable, View, moved
from opt.data.layout import self_layout
from opt.data.tokenizer import Tokenizer
from opt.nn.block import Stack
from opt.nn.compiled import uncompiled
from opt.nn.embed import TextEmbedder
from opt.nn.heads import TokenHead
from opt.nn.towers import Tower


class Editor(nn.Module):
    """layers, width, heads, inner: of the stack. positions: longest text. taught: whether its weights come to mean
    something in the run; else they must be filled before it is asked."""

    taught: Tensor

    def __init__(self, words: int, positions: int, layers: int, width: int, heads: int, inner: int, epsilon: float,
                 taught: bool) -> None:
        super().__init__()
        self.tower = Tower(TextEmbedder(words, positions, width, 0.0, epsilon),
                           Stack(layers, width, heads, inner, 0.0, post_norm=True, epsilon=epsilon))
        self.head = TokenHead(width, words, epsilon)
        self.register_buffer("taught", torch.tensor(taught))

    def forward(self, table: TextTable, view: View, place_M: Tensor) -> Tensor:
        """Logits (M, V) of what stands at the flat places `place_M` of the view."""
        return self._words(embedding(place_M, self.tower(table, view).hidden))

    def idle(self, device: torch.device) -> Tensor:
        """Logits of no place, (0, V): every parameter takes part, and its gradient is zero."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        hidden_0D = self.tower.embedder.at(none, none)  # type: ignore[operator]
        with uncompiled():
            return self._words(self.tower.stack(hidden_0D, moved(self_layout(np.zeros(0, np.int64)), device)))

    def _words(self, hidden_MD: Tensor) -> Tensor:
        embedder = self.tower.embedder
        assert isinstance(embedder, TextEmbedder)
        return self.head(hidden_MD, embedder.token.weight)


def open_words(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that may be edited and may stand in: bool (V,). Neither special tokens nor marks without a letter or
    digit."""
    open_V = np.zeros(tokenizer.size, bool)
    open_V[[number for number in tokenizer.ordinary.tolist()
            if any(letter.isalnum() for letter in tokenizer.decode([number]))]] = True
    return open_V


def whole_words(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that begin a word: bool (V,)."""
    return np.diff(tokenizer.words_of(np.arange(tokenizer.size)), prepend=-1) > 0
