"""ALBEF (arXiv 2107.07651): picture and words aligned in one space before words look at the picture.

    image  [class] patches       -- pre-norm Stack -->  [class] --Projection--> (B, E) \\
    text   [CLS] words [SEP]     -- post-norm Stack --> [CLS]   --Projection--> (B, E)  > contrast with a twin's keys
    audio  [class] frames        -- pre-norm Stack -->  [class] --Projection--> (B, E) /  and a ring of earlier ones
    text looks at its context, the picture's states and behind them the speech's (where it hears):
      true pairs, hard negatives of all ranks  -- fusion Stack with cross-attention --> [CLS] --> match or not
      texts with hidden words                  -- the same                          --> hidden words

A twin of all this follows slowly: its vectors are the keys, and its beliefs part of the targets (section 3.3).
Shape legend: S sequences, P pairs, B rows, M hidden words, V vocabulary, D width, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from tyro.conf import Fixed, Suppress

from opt.config import UserError
from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import Packer
from opt.data.pixels import Sight
from opt.data.record import Lengths
from opt.data.tokenizer import Tokenizer
from opt.distributed import rank
from opt.nn.embed import TextEmbedder
from opt.nn.heads import Projection, TokenHead
from opt.nn.init import by_width
from opt.nn.momentum import Twin
from opt.nn.states import States, beside, onto
from opt.nn.towers import Tower
from opt.objectives.masked import token_cross_entropy
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.asking import Answering, asked
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes, require
from opt.systems.shared.encoders import TEXT_EPSILON, bert, towers
from opt.systems.shared.matching import CONTEXTS, contexts, draw_contexts, odds, pair_up, usable
from opt.systems.shared.momentum import MomentumContrast
from opt.systems.shared.rows import Asked, TowerRow, TowerRows
from opt.systems.shared.tuning import Tuning
from opt.systems.system import DataFacts, Output, Preset, Progress


@dataclass(frozen=True)
class ALBEFConfig:
    """Sizes of towers and fusion, and how the twin teaches. Raises UserError for values out of range."""

    sight: Sight = Sight(size=256, patch=16)
    image: Sizes = Sizes()
    text: Sizes = Sizes(layers=6)
    """Of the text tower, and but for the layers of the fusion."""
    fusion_layers: int = 6
    """Layers behind the text tower's that look at the context."""
    audio: Sizes = Sizes()
    """Of the speech tower, where it hears."""
    hears: bool = False
    """Has a tower for speech: a context beside the picture, and the contrast of all three pairs (not in the paper)."""
    space: int = 256
    """Width of the shared space."""
    text_positions: int = 30
    """Longest text in tokens, [CLS] and [SEP] included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    dropout: float = 0.1
    """In the text tower and the fusion."""
    token_rate: float = 0.15
    """Chance of each token to be hidden."""
    negatives: Literal["hard", "random"] = "hard"
    """What is matched wrongly: hard, the likelier the closer by the contrast; random, evenly."""
    momentum: float = 0.995
    """Share of the twin that stays in each step."""
    ring_rows: int = 65_536
    """Earlier samples whose keys are kept as negatives of the contrast."""
    distillation: float = 0.4
    """Share of the targets that is what the twin believes (the paper's alpha); 0: none."""
    ramp: float = 0.033
    """Share of training over which distillation rises from 0: one epoch of thirty."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions", "fusion_layers", "ring_rows"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("dropout",), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("token_rate", "momentum", "distillation"), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("ramp",), "above 0 and at most 1", lambda value: 0 < value <= 1),
        ))

    def alpha(self, progress: Progress) -> float:
        """The share of the targets that the twin's beliefs are by now."""
        return self.distillation * min(1.0, progress.fraction / self.ramp)


def base() -> Preset:
    """ViT-B/16, BERT's layers, and the paper's recipe: 512 pairs a step, 30 epochs of 5 million."""
    return Preset(
        ALBEFConfig(Sight(size=256, patch=16, least_area=0.2)),
        LoopConfig(steps=300_000, batch_tokens=150_000, workers=8, save_every=1000),
        OptimConfig(learning_rate=1e-4, warmup=0.007, final=0.1, beta2=0.999, weight_decay=0.02),
        vocabulary_size=30_522,
    )


def _tiny(hears: bool) -> Preset:
    config = ALBEFConfig(
        TINY_SIGHT, TINY, Sizes(TINY.width, 2, TINY.heads, TINY.inner), fusion_layers=2, audio=TINY, hears=hears,
        space=128, text_positions=64, dropout=0.0, momentum=0.9, ring_rows=512, ramp=0.2,
    )
    return Preset(config, LoopConfig(batch_tokens=16_384))


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return _tiny(hears=False)


def trimodal() -> Preset:
    """`tiny` with a tower for speech."""
    return _tiny(hears=True)


class Rows(TowerRows):
    """Texts of usable rows come once more, behind all others, with hidden words.

    targets "mlm"           hidden words, among the tokens of those last texts
    counts "mlm", "match"   hidden words, usable rows
    """

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality's own sequence, and of the text with hidden words, where it has a context."""
        sizes = self.sizes(lengths)
        has_context = sum(sizes.get(name, 0) for name in CONTEXTS) > 0
        return np.maximum(sum(sizes.values()) + sizes["text"] * has_context, 1)

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """Contexts, and the words that are hidden from the fusion."""
        context = draw_contexts(rows)
        used = [row for row, drawn in zip(rows, context, strict=True) if drawn.any() and "text" in row.alone]
        index, label, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for row in used:
            hidden = corrupt.positions(len(row.ids), self.config.token_rate, row.rng)
            shown = corrupt.words(row.ids[hidden], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
            place = packer.sequence("text", [packer.replace_text(row.parts["text"], 1 + hidden, shown)])
            index.append(start + 1 + hidden)
            label.append(row.ids[hidden])
            start += place.length
        targets = Targets(torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(label)))
        return Asked({"mlm": targets}, counts={"mlm": len(targets.label), "match": len(used)},
                     host={"context": context})


class Encoders(nn.Module):
    """All that the twin follows: towers, projections, fusion and word head."""

    def __init__(self, config: ALBEFConfig, words: int, speech_width: int) -> None:
        super().__init__()
        text, image, audio = config.text, config.image, config.audio
        self.towers = towers(config, words, speech_width)
        widen = config.hears and audio.width != image.width
        self.widen = nn.Linear(audio.width, image.width) if widen else nn.Identity()
        width = dict.fromkeys(self.towers, image.width) | {"text": text.width}
        self.project = nn.ModuleDict({name: Projection(width[name], config.space, bias=True) for name in self.towers})
        self.fusion = bert(config, config.fusion_layers, cross=True)
        self.word_head = TokenHead(text.width, words, TEXT_EPSILON)

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences through its tower; speech then has the picture's width."""
        states: States = self.towers[modality](batch.table(modality), batch.views[modality])
        return States(self.widen(states.hidden), states.lengths) if modality == "audio" else states

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state of each sequence: (S, E)."""
        return self.project[modality](states.first)

    def fuse(self, text: States, context: States, rows: np.ndarray) -> States:
        """Texts that look at contexts `rows` (P,), one each: their states behind the fusion."""
        looks = onto(text.lengths, context.lengths, text.hidden.device, rows)
        return States(self.fusion(text.hidden, text.layout, context.hidden, looks), text.lengths)

    def words(self, hidden_MD: Tensor) -> Tensor:
        """Logits (M, V) of hidden words."""
        embedder = cast(TextEmbedder, cast(Tower, self.towers["text"]).embedder)
        return self.word_head(hidden_MD, embedder.token.weight)


class ALBEF(Answering):
    """Align before Fuse."""

    name = "albef"
    config_type = ALBEFConfig

    def __init__(self, config: ALBEFConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self.encoders = Encoders(config, tokenizer.size, facts.speech_width)
        self.match_head = nn.Linear(config.text.width, 2)
        self.begin_answering(config.text.width)
        self.apply(by_width)
        self.twin = Twin(self.encoders, config.momentum)
        self.contrast = MomentumContrast(self.modalities, config.space, config.ring_rows)

    def preparer(self) -> Any:
        """Samples -> a sequence a modality, and texts with hidden words: `Rows`, or questions, where it is tuned."""
        return asked(Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities), self.config.tuning)

    @property
    def kept(self) -> Encoders:
        """The twin, for calls of its methods."""
        return cast(Encoders, self.twin.copy)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Contrast with the twin's keys; then one fusion of true pairs, wrong pairs and texts with hidden words."""
        if "answer" in batch.targets:
            return self.answered(batch)
        alpha = self.config.alpha(progress)
        states, vectors = self._each(self.encoders, batch)
        with torch.no_grad():
            kept_states, kept_vectors = self._each(self.kept, batch)
        contrast = self.contrast(vectors, kept_vectors, batch, alpha)

        pairs = pair_up(contrast, batch, self.contrast.temperature() * (self.config.negatives == "hard"))
        text, hidden, context = _sequences(states, batch)
        own = rank() * len(batch.keys) + np.flatnonzero(usable(batch))
        distinct, looks = np.unique(np.concatenate([pairs.context, own]), return_inverse=True)
        texts = States.joined([text.of_ranks(pairs.text), hidden])
        fused = self.encoders.fuse(texts, context.of_ranks(distinct), looks)
        match = pairs.term(odds(self.match_head(fused.first[: len(pairs.text)])), batch.counts["match"])

        place_M, label_M = batch.targets["mlm"].index, batch.targets["mlm"].label
        logits_MV = self.encoders.words(embedding(place_M + len(fused.hidden) - len(hidden.hidden), fused.hidden))
        soft_MV = self._believed(kept_states, batch, place_M) if alpha > 0 else None
        mlm = token_cross_entropy(logits_MV, label_M, batch.counts["mlm"], soft_MV=soft_MV, alpha=alpha)
        return Output({**contrast.terms, "match": match, "mlm": mlm}, contrast.carry)

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """The twin follows, the ring takes in the twin's vectors, the temperature stays in its range. A model that is
        tuned for questions needs none of them."""
        if self.config.tuning.task != "pretraining":
            return
        self.twin.update(self.encoders, kept)
        self.contrast.after_step(carries, kept)

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences through its tower."""
        return self.encoders.encode(modality, batch)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.encoders.vector(modality, states)

    @torch.inference_mode()
    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """The logit of "match" (P,): by it alone the authors order candidates. A context that many texts look at is
        turned to keys and values once. Raises UserError without a text or without a context."""
        return self.match_head(self._pooled(parts, rows))[:, 1].float()

    @torch.inference_mode()
    def match_probability(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Of "match" against "no match" (P,)."""
        return odds(self.match_head(self._pooled(parts, rows))).float().sigmoid()

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """The text's first state (P, D) behind the fusion, where sample p of all parts belongs together."""
        return self._pooled(parts, {name: np.arange(len(part)) for name, part in parts.items()})

    def _pooled(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        seen = [name for name in CONTEXTS if name in parts]
        if "text" not in parts or not seen:
            raise UserError(f"{self.name} matches a text with a picture, speech or both, not {' and '.join(parts)}")
        distinct, context = np.unique(np.stack([rows[name] for name in seen], axis=1), axis=0, return_inverse=True)
        looked_at = beside([parts[name].take(distinct[:, place]) for place, name in enumerate(seen)])
        return self.encoders.fuse(parts["text"].take(rows["text"]), looked_at, context.reshape(-1)).first

    def _each(self, encoders: Encoders, batch: Batch) -> tuple[dict[str, States], dict[str, Tensor]]:
        """States and vectors of each modality."""
        states = {name: encoders.encode(name, batch) for name in self.modalities}
        return states, {name: encoders.vector(name, each) for name, each in states.items()}

    @torch.no_grad()
    def _believed(self, states: Mapping[str, States], batch: Batch, place_M: Tensor) -> Tensor:
        """The twin's logits (M, V) of hidden words, from its own states."""
        _, hidden, context = _sequences(states, batch)
        fused = self.kept.fuse(hidden, context, np.flatnonzero(usable(batch)))
        return self.kept.words(embedding(place_M, fused.hidden))


def _sequences(states: Mapping[str, States], batch: Batch) -> tuple[States, States, States]:
    """Of each row its text and its context; of usable rows the text with hidden words."""
    text, count = states["text"], int(usable(batch).sum())
    hidden = text.take(np.arange(len(text) - count, len(text)))
    return text.take(batch.host["rows"][:, 0]), hidden, contexts(states, batch)
