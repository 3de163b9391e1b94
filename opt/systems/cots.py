"""COTS (arXiv 2204.07441): two streams that never look at each other, and agree on three levels all the same.

    text   [CLS] words [SEP]  -- post-norm Stack --> [CLS]   --Projection--> (B, E) \\  instance: contrast with a twin's
    image  [class] patches    -- pre-norm Stack -->  [class] --Projection--> (B, E)  >  keys and a ring of earlier ones
    audio  [class] frames     -- pre-norm Stack -->  [class] --Projection--> (B, E) /   task: both find the same pairs
    token: texts with hidden words, pictures with hidden patches, each through its own stream
           states at hidden places + another stream's first state --> the words; the patches' image codes

Pairs whose keys are far less alike than those of earlier pairs are not learned from (adaptive momentum filter). A model
in use is its streams and projections. It may hear (not in the paper): speech is a third stream.
Shape legend: S sequences, B rows, K rows of all ranks, M hidden words or patches, D width, E shared space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import PATCH, TEXT, Packer
from opt.data.pixels import Sight
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.distributed import rank
from opt.nn.embed import TextEmbedder
from opt.nn.heads import Projection, TokenHead
from opt.nn.init import by_width
from opt.nn.momentum import Twin
from opt.nn.states import States
from opt.nn.towers import Tower
from opt.objectives.agreement import Sides, agreement, trusted
from opt.objectives.contrastive import NO_PICTURE
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.codes import codes_of, require_codes
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes, require
from opt.systems.shared.encoders import TEXT_EPSILON, towers
from opt.systems.shared.momentum import Compared, MomentumContrast, both
from opt.systems.shared.rows import Asked, TowerRow, TowerRows
from opt.systems.shared.towers import TowerSystem
from opt.systems.system import DataFacts, Output, Preset, Progress

HIDDEN = {"cmlm": "text", "cmvm": "image"}
"""Terms of the token level, and what they hide."""


@dataclass(frozen=True)
class COTSConfig:
    """Sizes of the streams, and on which levels they agree. Raises UserError for values out of range."""

    sight: Sight = Sight(size=384, patch=16)
    image: Sizes = Sizes()
    text: Sizes = Sizes()
    audio: Sizes = Sizes()
    """Of the speech stream, where it hears."""
    hears: bool = False
    """Has a stream for speech, and agrees on all three pairs of modalities (not in the paper)."""
    space: int = 256
    """Width of the shared space."""
    text_positions: int = 50
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    dropout: float = 0.1
    """In the text stream."""
    instance_weight: float = 1.0
    """Of the contrast with momentum keys. A level of weight 0 is not computed."""
    token_weight: float = 1.0
    """Of hidden words and of hidden patches."""
    task_weight: float = 1.0
    """Of the agreement on which pairs are found."""
    token_rate: float = 0.15
    """Chance of each token to be hidden."""
    patch_rate: float = 0.4
    """Share of patches that are hidden, in blocks."""
    momentum: float = 0.99
    """Share of the twin that stays in each step."""
    ring_rows: int = 12_800
    """Earlier samples whose keys are kept."""
    filtered: Sides = "below"
    """Pairs that are not learned from: those far less alike than others, also those far more alike, or none."""
    deviations: float = 2.0
    """How far that is from the mean of the ring, in standard deviations."""

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions", "ring_rows"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("dropout",), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("token_rate", "patch_rate", "momentum"), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("instance_weight", "token_weight", "task_weight", "deviations"), "at least 0", lambda value: value >= 0),
            (("instance_weight",), "above 0 where task-weight is 0: nothing else makes a space that all share",
             lambda value: value + self.task_weight > 0),
        ))


def base() -> Preset:
    """ViT-B/16 at 384 pixels and BERT; shards hold 24 x 24 image codes (`--codes-grid 24`). The recipe is that of 5.3
    million pairs at 512 a step, as far as it is known."""
    return Preset(
        COTSConfig(),
        LoopConfig(steps=150_000, batch_tokens=620_000, workers=8, save_every=1000),
        OptimConfig(learning_rate=5e-5, warmup=0.05, beta2=0.999, weight_decay=0.02),
        vocabulary_size=30_522,
    )


def _tiny(hears: bool) -> Preset:
    config = COTSConfig(TINY_SIGHT, TINY, TINY, TINY, hears, space=128, text_positions=64, dropout=0.0, momentum=0.9,
                        ring_rows=512)
    return Preset(config, LoopConfig(batch_tokens=16_384))


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return _tiny(hears=False)


def trimodal() -> Preset:
    """`tiny` with a stream for speech."""
    return _tiny(hears=True)


class Rows(TowerRows):
    """Texts and pictures of rows with another modality come once more, in views of their own, with parts hidden.

    views "cmlm", "cmvm"     texts with hidden words, pictures with hidden patches
    targets, counts "..."    what is hidden
    extra "beside_cmlm", ... int64 (M,): the sequence that tells of each, one of the row's other modalities, where the
                             whole sequences of these lie behind one another in the order of MODALITIES
    """

    def packer(self) -> Packer:
        """With views of what is hidden."""
        packer = super().packer()
        packer.views |= {"cmlm": (TEXT,), "cmvm": (PATCH,)} if self.config.token_weight else {}
        return packer

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality's own sequence, and of those with hidden parts."""
        sizes = self.sizes(lengths)
        asked = (sum(size > 0 for size in sizes.values()) > 1) & (self.config.token_weight > 0)
        hidden = sizes["text"] + sizes["image"] * (lengths.codes > 0)
        return np.maximum(sum(sizes.values()) + hidden * asked, 1)

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """Hidden words and patches, and who tells of them."""
        asked = Asked()
        if not self.config.token_weight:
            return asked
        whole = {name: sum(name in row.alone for row in rows) for name in self.modalities}
        for term, name in HIDDEN.items():
            others = [other for other in self.modalities if other != name]
            before = dict(zip(others, np.cumsum([0, *(whole[other] for other in others)]), strict=False))
            index, label, beside = ([np.zeros(0, np.int64)] for _ in range(3))
            for row in rows:
                tellers = [other for other in others if other in row.alone]
                hidden = self._hidden(packer, row, name) if tellers and name in row.alone else None
                if hidden is not None:
                    index.append(hidden[0])
                    label.append(hidden[1])
                    teller = tellers[int(row.rng.integers(len(tellers)))]
                    beside.append(np.full(len(hidden[1]), before[teller] + row.alone[teller].number))
            targets = Targets(torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(label)))
            asked.targets[term], asked.counts[term] = targets, len(targets.label)
            asked.extra[f"beside_{term}"] = torch.from_numpy(np.concatenate(beside))
        return asked

    def _hidden(self, packer: Packer, row: TowerRow, modality: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A sequence with hidden parts: where they are in its view, and what they were; None for a picture without
        codes."""
        if modality == "text":
            where = corrupt.positions(len(row.ids), self.config.token_rate, row.rng)
            shown = corrupt.words(row.ids[where], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
            place = packer.sequence("cmlm", [packer.replace_text(row.parts["text"], 1 + where, shown)])
            return place.start + 1 + where, row.ids[where]
        codes = codes_of(row.sample, self.config.sight)
        if codes is None:
            return None
        where = corrupt.blocks(self.config.sight.grid, self.config.patch_rate, row.rng)
        place = packer.sequence("cmvm", [packer.first(PATCH), packer.hide_patches(row.parts["image"], where)])
        return place.start + 1 + where, codes[where]


class Streams(nn.Module):
    """All that is used after training, and that the twin follows: streams and projections."""

    def __init__(self, config: COTSConfig, words: int, speech_width: int) -> None:
        super().__init__()
        self.towers = towers(config, words, speech_width, masks=config.token_weight > 0)
        self.project = nn.ModuleDict({name: Projection(getattr(config, name).width, config.space, bias=True)
                                      for name in self.towers})

    def encode(self, modality: str, batch: Batch, view: str | None = None) -> States:
        """One modality's sequences, whole or of another view, through its stream."""
        return self.towers[modality](batch.table(modality), batch.views[view or modality])

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state of each sequence: (S, E)."""
        return self.project[modality](states.first)


class HiddenHead(nn.Module):
    """What is hidden, from states at hidden places plus the first state of another stream, linear to their width.

    others: widths of the other streams by name. tokens: how many words or codes there are.
    """

    def __init__(self, width: int, others: Mapping[str, int], tokens: int) -> None:
        super().__init__()
        self.beside = nn.ModuleDict({name: nn.Linear(other, width) for name, other in others.items()})
        self.head = TokenHead(width, tokens, TEXT_EPSILON)

    def forward(self, hidden_MD: Tensor, first: Mapping[str, Tensor], beside_M: Tensor, table_VD: Tensor) -> Tensor:
        """Logits (M, V). first: states (S, D) of whole sequences by modality; beside_M: which of them, end to end."""
        told = torch.cat([linear(first[name]) for name, linear in self.beside.items()])
        return self.head(hidden_MD + embedding(beside_M, told), table_VD)


class COTS(TowerSystem):
    """Collaborative two-stream pretraining."""

    name = "cots"
    config_type = COTSConfig
    reads_codes: ClassVar[bool] = True

    def __init__(self, config: COTSConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self.streams = Streams(config, tokenizer.size, facts.speech_width)
        if config.token_weight:
            require_codes(config.sight, facts)
            widths, tokens = {name: getattr(config, name).width for name in self.modalities}, tokenizer.size
            self.heads = nn.ModuleDict({
                term: HiddenHead(widths[name], {other: width for other, width in widths.items() if other != name}, size)
                for (term, name), size in zip(HIDDEN.items(), (tokens, facts.codebook), strict=True)
            })
            self.code_table = nn.Embedding(facts.codebook, config.image.width)
            nn.init.normal_(self.code_table.weight, std=0.02)
        self.apply(by_width)
        self.twin = Twin(self.streams, config.momentum)
        self.contrast = MomentumContrast(self.modalities, config.space, config.ring_rows)

    def preparer(self) -> Rows:
        """Samples -> a sequence a modality, and texts and pictures with hidden parts."""
        return Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities)

    @property
    def kept(self) -> Streams:
        """The twin, for calls of its methods."""
        return cast(Streams, self.twin.copy)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Each stream by itself; then who finds whom, whether both find the same, and what is hidden."""
        config, terms = self.config, {}
        states = {name: self.streams.encode(name, batch) for name in self.modalities}
        vectors = {name: self.streams.vector(name, each) for name, each in states.items()}
        with torch.no_grad():
            kept = {name: self.kept.vector(name, self.kept.encode(name, batch)) for name in self.modalities}
        compared = self.contrast.compare(vectors, kept, batch)
        online, keys = compared.online, compared.keys
        for a, b in self.contrast.pairs:
            learned_B, count = self._learned(compared, a, b, batch.counts[f"align_{a}_{b}"])
            if config.instance_weight:
                terms[f"align_{a}_{b}"] = self.contrast.term(compared, a, b, learned_B, count, 0.0,
                                                             config.instance_weight)
            if config.task_weight:
                terms[f"agree_{a}_{b}"] = agreement(online[a], online[b], keys[a], keys[b], learned_B, both(keys, a, b),
                                                    self.contrast.temperature(), count, config.task_weight)
        if config.token_weight:
            terms |= {term: self._hidden(term, states, batch) for term in HIDDEN}
        return Output(terms, compared.of_ranks)

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """The twin follows, the ring takes in its vectors, also of pairs that were filtered; the temperature stays in
        its range."""
        self.twin.update(self.streams, kept)
        self.contrast.after_step(carries, kept)

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences through its stream."""
        return self.streams.encode(modality, batch)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.streams.vector(modality, states)

    @torch.inference_mode()
    def similarity(self, samples: Sequence[Sample], a: str, b: str) -> Tensor:
        """How alike the twin's keys of two modalities of each sample are, as it trains on them: cosines (B,)."""
        seen = [dataclasses.replace(sample, pictures=sample.pictures[:1]) for sample in samples]
        batch = self.preparer().inputs(seen, [a, b]).to(self.device)
        first_BE, second_BE = (self.kept.vector(name, self.kept.encode(name, batch)) for name in (a, b))
        return (first_BE * second_BE).sum(dim=1)

    def trusted(self, similarity_K: Tensor, both_K: Tensor, a: str, b: str) -> Tensor:
        """Which pairs are learned from, bool (K,), by how alike those of the ring are; all until the ring is full."""
        ring = dict(self.contrast.ring.named_buffers())
        full = (ring["picture"] != NO_PICTURE).all()
        return trusted(similarity_K, both_K, (ring[a] * ring[b]).sum(dim=1), both(ring, a, b) & full,
                       self.config.deviations, self.config.filtered)

    def _learned(self, compared: Compared, a: str, b: str, count: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B,) of this rank whose pair is learned from, and what is left of `count`: the share that all ranks
        learn from in this micro-batch, as the filter sees no other."""
        of_ranks, rows = compared.of_ranks, len(compared.own["picture"])
        both_K = both(of_ranks, a, b)
        learned_K = self.trusted((of_ranks[a] * of_ranks[b]).sum(dim=1), both_K, a, b)
        share = learned_K.sum() / both_K.sum().clamp(min=1)
        return learned_K[rank() * rows : (rank() + 1) * rows], count * share

    def _hidden(self, term: str, states: Mapping[str, States], batch: Batch) -> Term:
        """Hidden words, or the image codes of hidden patches, by their own stream and one state of another."""
        masked, target = self.streams.encode(HIDDEN[term], batch, term), batch.targets[term]
        embedder = cast(TextEmbedder, cast(Tower, self.streams.towers["text"]).embedder)
        table_VD = embedder.token.weight if term == "cmlm" else self.code_table.weight
        first = {name: each.first for name, each in states.items()}
        logits_MV = self.heads[term](embedding(target.index, masked.hidden), first, batch.extra[f"beside_{term}"],
                                     table_VD)
        return token_cross_entropy(logits_MV, target.label, batch.counts[term], weight=self.config.token_weight)
