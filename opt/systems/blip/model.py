"""BLIP (arXiv 2201.12086): beside a tower for pictures one text network, which reads, judges and writes.

    image    [class] patches ---Stack--> States ---first---> contrast        (and audio, where it hears)
    reads    [CLS] words [SEP] ---Stack--------------------> [CLS]  contrast with a twin's keys and a ring
    judges   [ENC] words [SEP] ---Stack onto a context-----> [ENC]  match or no match, against hard negatives
    writes   [DEC] words -------- Stack onto a context, ---> each next word, [SEP] at the end
                                  causal self-attention of its own

The three functions share all tensors but the writer's self-attention and its norm. A context is the picture, the
speech, or one behind the other (opt/systems/shared/matching.py).
Shape legend: N packed tokens, S sequences, B rows, P pairs, R rows of the decoder, V words, W width, E shared space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import Batch
from opt.data.record import Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.block import BlockCache
from opt.nn.compiled import uncompiled
from opt.nn.heads import TokenHead
from opt.nn.init import by_width
from opt.nn.momentum import Twin
from opt.nn.sampling import Sampling
from opt.nn.states import States, beside
from opt.nn.writing import write
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.systems.blip.config import BLIPConfig
from opt.systems.blip.networks import Encoders, TextNetwork
from opt.systems.blip.rows import LANGUAGE, WRITING, Rows
from opt.systems.shared.asking import Answering, asked
from opt.systems.shared.matching import CONTEXTS, contexts, odds, pair_up, usable
from opt.systems.shared.momentum import Contrasted, MomentumContrast
from opt.systems.system import DataFacts, Output, Progress


class BLIP(Answering):
    """Bootstrapping Language-Image Pre-training."""

    name = "blip"
    config_type = BLIPConfig

    def __init__(self, config: BLIPConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self.encoders = Encoders(config, tokenizer.size, facts.speech_width)
        self.match_head = nn.Linear(config.text.width, 2)
        self.word_head = TokenHead(config.text.width, tokenizer.size, config.text_epsilon)
        self.contrast = MomentumContrast(self.modalities, config.space, config.ring_rows)
        self.begin_answering(config.text.width)
        self.apply(by_width)
        self.twin = Twin(self.encoders, config.momentum)

    def preparer(self) -> Any:
        """Samples -> a sequence a modality, and what is written: `Rows`, or questions, where it is tuned."""
        return asked(self._rows(), self.config.tuning)

    def _rows(self) -> Rows:
        return Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Each modality by itself, contrasted with what the twin says; then texts judged, and written, by contexts."""
        if "answer" in batch.targets:
            return self.answered(batch)
        read = {name: self.encoders(name, batch) for name in self.modalities}
        kept = {name: self.twin(name, batch)[1] for name in self.modalities}
        found = self.contrast({name: vectors for name, (_, vectors) in read.items()}, kept, batch,
                              self.config.alpha(progress))
        terms = {name: dataclasses.replace(term, weight=self.config.contrast_weight)
                 for name, term in found.terms.items()}
        context = contexts({name: states for name, (states, _) in read.items()}, batch)
        with uncompiled():  # pairs are drawn on the device: so many tokens as nobody foresees
            terms |= {"match": self._match(found, batch, context), LANGUAGE: self._language(batch, context)}
        return Output(terms, found.carry)

    def _match(self, found: Contrasted, batch: Batch, context: States) -> Term:
        """True pairs and hard negatives, of all ranks, in one pass."""
        pairing = pair_up(found, batch, self.contrast.temperature())
        words = self.network.words(batch.text, batch.views["text"], self.tokenizer.enc)
        words = words.take(batch.host["rows"][:, 0]).of_ranks(pairing.text)
        distinct, looks = np.unique(pairing.context, return_inverse=True)
        judged = self.network.onto(words, context.of_ranks(distinct), looks)
        return pairing.term(odds(self.match_head(judged.first)), batch.counts["match"], self.config.match_weight)

    def _language(self, batch: Batch, context: States) -> Term:
        """Each next word, and the end."""
        target = batch.targets[LANGUAGE]
        words = self.network.words(batch.text, batch.views[WRITING], self.tokenizer.bos)
        written = self.network.onto(words, context, np.flatnonzero(usable(batch)), writing=True)
        logits_MV = self.word_logits(nn.functional.embedding(target.index, written.hidden))
        return token_cross_entropy(logits_MV, target.label, batch.counts[LANGUAGE], self.config.smoothing,
                                   self.config.language_weight)

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """The twin follows, the ring takes the step's keys in; a model tuned for questions needs neither."""
        if self.config.tuning.task != "pretraining":
            return
        self.twin.update(self.encoders, kept)
        self.contrast.after_step(carries, kept)

    @property
    def network(self) -> TextNetwork:
        """The text network."""
        network = self.encoders.towers["text"]
        assert isinstance(network, TextNetwork)
        return network

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences, read by themselves."""
        return self.encoders.read(modality, batch)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.encoders.vectors(modality, states)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """What word follows: (..., W) -> (..., V)."""
        return self.word_head(hidden, self.network.embedder.token.weight)

    def unfused(self, modality: str, batch: Batch) -> States:
        """A picture's or a recording's states. Of a text its words before the network, [ENC] first: every layer looks
        at what it is judged by."""
        if modality != "text":
            return super().unfused(modality, batch)
        return self.network.words(batch.text, batch.views["text"], self.tokenizer.enc)

    @torch.inference_mode()
    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """The logit (P,) of "match", to which the cosine is added (`cosine_weight`; the authors' evaluation)."""
        return self.match_head(self._pooled(parts, rows)).float()[:, 1]

    @torch.inference_mode()
    def match_probability(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Probability (P,) of "match" against "no match", for what `fuse` takes."""
        return self.match_head(self._pooled(parts, rows)).float().softmax(dim=1)[:, 1]

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """The state of [ENC] (P, W): the text of each sample, looking at its other parts."""
        return self._pooled(parts, {name: np.arange(len(part)) for name, part in parts.items()})

    def _pooled(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """What many texts look at is turned to keys and values once."""
        seen = [name for name in CONTEXTS if name in rows]
        if "text" not in rows or not seen:
            raise self._cannot(f"judge {' and '.join(rows)}: it judges a text by a picture, speech or both")
        distinct, context = np.unique(np.stack([rows[name] for name in seen], axis=1), axis=0, return_inverse=True)
        looked_at = beside([parts[name].take(distinct[:, place]) for place, name in enumerate(seen)])
        return self.network.onto(parts["text"].take(rows["text"]), looked_at, context.reshape(-1)).first

    @property
    def cosine_weight(self) -> float:
        """A cosine counts as much as the logit of "match": the authors' rule."""
        return 1.0

    @torch.inference_mode()
    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        """Written by pictures, speech or both; the prompt is given, and not part of the text."""
        if unread := [name for name in modalities if name not in CONTEXTS]:
            raise self._cannot(f"write from {unread[0]}: it writes from pictures, speech or both")
        states = [self.alone(samples, name) for name in CONTEXTS if name in modalities]
        start = self._rows().start().tolist()
        limit = min(sampling.limit, self.config.text_positions - len(start) + 1)
        ids_BL = write(Words(self), *beside(states).padded(), start, self.tokenizer.eos, limit, sampling.for_text(),
                       [sample.key for sample in samples])
        return [self.tokenizer.decode(ids) for ids in ids_BL.cpu().numpy()]


class Words:
    """The text network as it writes: a `Writer` (opt/nn/writing.py)."""

    def __init__(self, system: BLIP) -> None:
        self.system, self.vocabulary = system, system.tokenizer.size

    def start(self, context_BMW: Tensor, valid_BM: Tensor, length: int, beams: int = 1) -> list[BlockCache]:
        """Caches of all blocks."""
        return self.system.network.stack.start(context_BMW, valid_BM, length, beams)

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], parents_R: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the next word."""
        if parents_R is not None:
            for cache in caches:
                cache.follow(position, parents_R)
        hidden_RW = self.system.network.embedder.at(ids_R, torch.full_like(ids_R, position))
        return self.system.word_logits(self.system.network.stack.step(hidden_RW, position, caches))
