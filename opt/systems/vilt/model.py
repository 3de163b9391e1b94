"""ViLT: words, patches and frames, hardly embedded, through one encoder that mixes them from its first layer on.

    text   [CLS] words [SEP]  word + position + type 0  \\                      [CLS] --Pooler--> match or not
    audio  frames             frame + position + type 2  > Stack (pre-norm) --> words --> hidden words
    image  [class] patches    patch + position + type 1 /                       words, patches --> transport (WPA)

Shape legend: N packed tokens, S sequences or rows, M targets, T words, P patches, D width, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import Batch, TextTable
from opt.data.layout import ranges
from opt.data.record import Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.block import Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Pooler, Projection, Temperature, TokenHead
from opt.nn.init import normal
from opt.nn.states import States, side_by_side
from opt.objectives.alignment import word_patch, word_patch_distance
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.systems.shared.asking import Answering, asked
from opt.systems.shared.pairs import contrasts
from opt.systems.shared.towers import as_clips
from opt.systems.system import DataFacts, Output, Progress
from opt.systems.vilt.config import ViLTConfig
from opt.systems.vilt.rows import Rows

TYPES = {"text": 0, "image": 1, "audio": 2}
"""Rows of the table of modality types."""


class ViLT(Answering):
    """arXiv 2102.03334."""

    name = "vilt"
    config_type = ViLTConfig

    def __init__(self, config: ViLTConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        sizes, dropout, epsilon = config.encoder, config.dropout, config.norm_epsilon
        width, speech_width = sizes.width, max(facts.speech_width, 1)
        self.text = TextEmbedder(tokenizer.size, config.text_positions, width, dropout, epsilon)
        self.image = PatchEmbedder(config.sight, width, dropout)
        self.audio = FrameEmbedder(speech_width, config.frame_positions, width, dropout, epsilon,
                                   masks=False) if config.hears else None
        self.types = nn.Embedding(len(config.reads), width)
        self.encoder = Stack(sizes.layers, width, sizes.heads, sizes.inner, dropout, epsilon=epsilon)
        self.pooler = Pooler(width)
        self.match_head = nn.Linear(width, 2)
        self.word_head = TokenHead(width, tokenizer.size, epsilon)
        self.project, self.temperature = None, None
        if config.contrast_weight > 0:
            self.project = nn.ModuleDict({name: Projection(width, config.space) for name in config.reads})
            self.temperature = Temperature()
        self.begin_answering(width)
        self.apply(normal)

    def preparer(self) -> Any:
        """Samples -> masked rows and rows to match: `Rows`, or questions, where it is tuned for them."""
        return asked(Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities), self.config.tuning)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Encode everything once, then ask each head about its own rows."""
        if "answer" in batch.targets:
            return self.answered(batch)
        hidden_ND = self.read(batch)
        return Output({
            **self._masked_words(hidden_ND, batch),
            **self._matching(hidden_ND, batch),
            **self._word_patches(hidden_ND, batch),
            **self._contrast(hidden_ND, batch),
        })

    def read(self, batch: Batch) -> Tensor:
        """States of every token (N, D)."""
        return self.encoder(self._embedded(batch), batch.views["encoder"].layout)

    def _embedded(self, batch: Batch) -> Tensor:
        """The tokens of all sequences before the encoder: (N, D)."""
        entries = [self.text(batch.text) + self.types.weight[TYPES["text"]]]
        if self.audio is not None:
            entries.append(self.audio(batch.frames) + self.types.weight[TYPES["audio"]])
        entries.append(self.image(batch.patches) + self.types.weight[TYPES["image"]])
        return nn.functional.embedding(batch.views["encoder"].gather, torch.cat(entries))

    def _masked_words(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MLM: whole words (section 3.2)."""
        target = batch.targets["mlm"]
        logits_MV = self.word_head(hidden_ND[target.index], self.text.token.weight)
        return {"mlm": token_cross_entropy(logits_MV, target.label, batch.counts["mlm"],
                                           weight=self.config.mlm_weight)}

    def _matching(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """ITM: do all parts belong together?"""
        target = batch.targets["match"]
        logits_S2 = self.match_head(self.pooler(hidden_ND[target.index]))
        return {"match": token_cross_entropy(logits_S2, target.label, batch.counts["match"],
                                             weight=self.config.match_weight)}

    def _word_patches(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """WPA: words near the patches of their own picture, special tokens left out."""
        words_ST, patches_SP = batch.extra["words"], batch.extra["patches"]
        distance_S = word_patch_distance(hidden_ND[words_ST.clamp(min=0)], hidden_ND[patches_SP.clamp(min=0)],
                                         words_ST >= 0, patches_SP >= 0)
        return {"wpa": word_patch(distance_S, batch.extra["near"], batch.counts["wpa"], self.config.wpa_weight)}

    def _contrast(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """Each modality by itself close to the others of its sample (ours)."""
        if self.project is None or self.temperature is None:
            return {}
        project, first_SD = self.project, hidden_ND[batch.views["encoder"].first]
        return contrasts(lambda name, sequences: project[name](first_SD[sequences]), self.modalities, batch,
                         self.temperature(), self.config.contrast_weight)

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps the temperature in its range."""
        if self.temperature is not None:
            self.temperature.clamp()

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences by themselves through the encoder."""
        return States.of(self.read(batch), batch.views["encoder"])

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E). Raises UserError where the model has no shared space."""
        if self.project is None:
            raise self._cannot("embed (it was trained with contrast-weight 0; score pairs by matching instead)")
        return self.project[modality](states.first)

    def unfused(self, modality: str, batch: Batch) -> States:
        """Embedded words, patches or frames. The encoder mixes modalities from its first layer on, so that this is all
        that pairs can share."""
        states = States.of(self._embedded(batch), batch.views["encoder"])
        if modality == "audio":  # [CLS] stands before whole sequences only: see `_together`
            index = torch.from_numpy(ranges(states.starts + 1, states.lengths - 1)).to(self.device)
            states = States(nn.functional.embedding(index, states.hidden), states.lengths - 1)
        return as_clips(states, modality, batch)

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """The first state of all parts together, pooled: (P, D)."""
        return self.pooler(self._together(parts).first)

    @torch.inference_mode()
    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Log-odds of the matching head."""
        logits_P2 = self.match_head(self.pooled({name: parts[name].take(rows[name]) for name in parts})).float()
        return logits_P2[:, 1] - logits_P2[:, 0]

    @property
    def cosine_weight(self) -> float:
        """1 / temperature where there is a contrast: its logit, a log-likelihood as matching's is."""
        return 0.0 if self.temperature is None else float(self.temperature().detach())

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """The pooled first state of all modalities together, and the mean of all states, side by side."""
        states = self._together({name: self.alone(samples, name) for name in modalities})
        row_N = torch.from_numpy(np.repeat(np.arange(len(states)), states.lengths)).to(self.device)
        sums_SD = torch.zeros_like(states.first).index_add_(0, row_N, states.hidden)
        mean_SD = sums_SD / torch.from_numpy(states.lengths).to(self.device)[:, None]
        return torch.cat([self.pooler(states.first), mean_SD], dim=1).float()

    def _together(self, parts: Mapping[str, States]) -> States:
        """Each sample of all parts side by side through the encoder, in the order of training."""
        ordered = [parts[name] for name in self.config.reads if name in parts]
        if "text" not in parts and "audio" in parts:
            ordered = [self._lone_cls(len(ordered[0])), *ordered]
        entries_ND, view = side_by_side(ordered)
        return States.of(self.encoder(entries_ND, view.layout), view)

    def _lone_cls(self, count: int) -> States:
        """[CLS] alone, `count` times."""
        cls = torch.tensor([self.tokenizer.cls], device=self.device)
        embedded_1D = self.text(TextTable(cls, torch.zeros_like(cls))) + self.types.weight[TYPES["text"]]
        return States(embedded_1D.expand(count, -1), np.ones(count, np.int64))

