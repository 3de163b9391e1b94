"""All that ViLEM's twin follows: towers, projections, and the lower text layers as readers of edited texts.

    batch --see--> Seen: a tower's states at the depths that lower text layers look at, and at its end
    edited texts, Seen, Looks --read_local, read_global--> hidden (N, D) --judge--> right or wrong, what stood there

Shape legend: S sequences, R rows with an edited text, N tokens of edited texts, M edited words, W all words of them,
K tokens of contexts, V vocabulary, D width, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from opt.data.batch import Batch, TextTable, View, moved
from opt.data.layout import AttentionLayout, cross_layout, ranges
from opt.nn.compiled import uncompiled
from opt.nn.embed import TextEmbedder
from opt.nn.heads import Projection, TokenHead
from opt.nn.states import ABSENT, States
from opt.nn.towers import Tower
from opt.systems.shared.encoders import TEXT_EPSILON, bert, towers
from opt.systems.shared.matching import CONTEXTS
from opt.systems.shared.momentum import by_row
from opt.systems.vilem.config import ViLEMConfig


@dataclass(frozen=True)
class Seen:
    """What a tower makes of pictures or speech. depths: states (K, D) that each lower text layer looks at, class tokens
    among them; states: the tower's last ones."""

    depths: tuple[Tensor, ...]
    states: States


@dataclass(frozen=True)
class Looks:
    """Who judges what. rows (R, 2): sequence of each text's picture or speech, ABSENT the other one. onto: what each
    text looks at among the tokens of all pictures and, behind them, of all speech: patches and frames, no class token.
    own: the texts' self-attention; text (N,): which of them each token is of."""

    rows: np.ndarray
    own: AttentionLayout
    onto: AttentionLayout
    text: Tensor

    @staticmethod
    def of(texts: States, rows: np.ndarray, seen: Mapping[str, Seen]) -> Looks:
        """Of texts, and the pictures and speech that each is judged by."""
        device, begin = texts.hidden.device, 0
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for column, name in enumerate(CONTEXTS):
            if name not in seen:
                continue
            states, there = seen[name].states, rows[:, column] != ABSENT
            starts[there] = begin + states.starts[rows[there, column]] + 1
            lengths[there] = states.lengths[rows[there, column]] - 1
            begin += len(states.hidden)
        onto = cross_layout(texts.starts, texts.lengths, starts, lengths)
        text_N = torch.from_numpy(np.repeat(np.arange(len(texts)), texts.lengths))
        return Looks(rows, texts.layout, moved(onto, device), text_N.to(device))


class Encoders(nn.Module):
    """Towers and heads. Without edits there is nothing to look at a context with, and no head beside the projections.
    """

    def __init__(self, config: ViLEMConfig, words: int, speech_width: int) -> None:
        super().__init__()
        text, image, audio, edits = config.text, config.image, config.audio, config.edits != "none"
        self.levels = text.layers
        self.towers = towers(config, words, speech_width, bert(config, text.layers, cross=edits))
        self.upper = bert(config, config.upper_layers)
        widen = config.hears and audio.width != image.width
        self.widen = nn.Linear(audio.width, image.width) if widen else nn.Identity()
        width = dict.fromkeys(self.towers, image.width) | {"text": text.width}
        self.project = nn.ModuleDict({name: Projection(width[name], config.space, bias=True) for name in self.towers})
        if edits:
            self.detect = nn.Linear(text.width, 2)
            self.word_head = TokenHead(text.width, words, TEXT_EPSILON)

    @property
    def lower(self) -> Tower:
        """Words and the lower text layers."""
        return cast(Tower, self.towers["text"])

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences through its tower; speech then has the picture's width. Texts look at nothing."""
        states: States = self.towers[modality](batch.table(modality), batch.views[modality])
        if modality == "text":
            return States(self.upper(states.hidden, states.layout), states.lengths)
        return States(self.widen(states.hidden), states.lengths) if modality == "audio" else states

    def see(self, modality: str, batch: Batch) -> Seen:
        """As `encode`, of pictures or speech, and what lower text layer m of M looks at: states before layer m L / M of
        the tower's L."""
        tower, view = cast(Tower, self.towers[modality]), batch.views[modality]
        hidden_KD, states = tower.entries(batch.table(modality), view), []
        for block in tower.stack.blocks:
            states.append(hidden_KD)
            hidden_KD = block(hidden_KD, view.layout)
        widen = self.widen if modality == "audio" else nn.Identity()
        last = States.of(widen(tower.stack.final_norm(hidden_KD)), view)
        depths = [states[level * len(states) // self.levels] for level in range(self.levels)]
        return Seen(tuple(widen(depth[: len(last.hidden)]) for depth in depths), last)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state of each sequence: (S, E)."""
        return self.project[modality](states.first)

    def entries(self, table: TextTable, view: View) -> States:
        """Texts before the first layer."""
        return States.of(self.lower.entries(table, view), view)

    def read_local(self, entries_ND: Tensor, seen: Mapping[str, Seen], looks: Looks) -> Tensor:
        """Texts that look at patches or frames, each layer at another depth: (N, D)."""
        depths = zip(*(seen[name].depths for name in CONTEXTS if name in seen), strict=True)
        hidden_ND = entries_ND
        with uncompiled():  # how many look at what nobody foresees
            for block, each in zip(self.lower.stack.blocks, depths, strict=True):
                hidden_ND = block(hidden_ND, looks.own, torch.cat(each), looks.onto)
        return hidden_ND

    def read_global(self, entries_ND: Tensor, gist_RD: Tensor, looks: Looks) -> Tensor:
        """Texts to whose every token is added what their picture or speech is as a whole: (N, D)."""
        with uncompiled():
            return self.lower.stack(entries_ND + embedding(looks.text, gist_RD), looks.own)

    def judge(self, hidden_ND: Tensor, word_W: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens `word_W` whether they are wrong or right (W, 2); of `place_M` what stood there (M, V)."""
        embedder = cast(TextEmbedder, self.lower.embedder)
        return (self.detect(embedding(word_W, hidden_ND)),
                self.word_head(embedding(place_M, hidden_ND), embedder.token.weight))


class Gist(nn.Module):
    """What a picture or speech is as a whole, in the width of words. Both branches of the twin read the model's own."""

    def __init__(self, modalities: tuple[str, ...], width: int, text_width: int) -> None:
        super().__init__()
        self.project = nn.ModuleDict({name: nn.Linear(width, text_width) for name in modalities if name in CONTEXTS})

    def forward(self, seen: Mapping[str, Seen], looks: Looks) -> Tensor:
        """Of each text's picture or speech: (R, D)."""
        parts = [by_row(self.project[name](seen[name].states.first), looks.rows[:, column])
                 for column, name in enumerate(CONTEXTS) if name in seen]
        return torch.stack(parts).sum(0)


def word_places(lengths: np.ndarray) -> np.ndarray:
    """Flat places of the words of texts of `lengths`, [CLS] and [SEP] left out."""
    return ranges(np.cumsum(lengths) - lengths + 1, lengths - 2)
