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
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

from opt.data.batch import Batch, Targets, TextTable, View
from opt.data.pack import FRAME, PATCH, TEXT, Packer
from opt.data.pixels import Sight
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.block import BlockCache, Stack
from opt.nn.compiled import uncompiled
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Projection, TokenHead
from opt.nn.init import by_width
from opt.nn.momentum import Twin
from opt.nn.sampling import Sampling
from opt.nn.states import States, beside, onto
from opt.nn.towers import Tower
from opt.nn.writing import write
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.asking import Answering, asked
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes, require
from opt.systems.shared.matching import CONTEXTS, contexts, draw_contexts, odds, pair_up, usable
from opt.systems.shared.momentum import Contrasted, MomentumContrast
from opt.systems.shared.rows import VIEWS, Asked, TowerRow, TowerRows
from opt.systems.shared.towers import as_clips
from opt.systems.shared.tuning import Tuning
from opt.systems.system import DataFacts, Output, Preset, Progress

WRITING, LANGUAGE = "writing", "language"
"""The view of what is written ([DEC], the prompt, words), and its targets."""


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes and weights of the parts. Raises UserError for values out of range."""

    sight: Sight = Sight(size=224, patch=16)
    image: Sizes = Sizes()
    """Of the tower for pictures, and of that for speech where it hears: words look at both."""
    text: Sizes = Sizes()
    hears: bool = False
    """Has a tower for speech: a second source of cross-attention, and all three pairs in the contrast (not in the
    paper)."""
    space: int = 256
    """Width of the shared space."""
    text_positions: int = 30
    """Longest text in tokens, special ones and the prompt included; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    dropout: float = 0.1
    """Of the text network."""
    image_epsilon: float = 1e-6
    text_epsilon: float = 1e-12
    """Of the norms; each as the authors have it."""
    contrast_weight: float = 1.0
    match_weight: float = 1.0
    language_weight: float = 1.0
    """Weights of the three objectives; 0 turns one off: 0, 0, 1 tunes a captioner, 1, 1, 0 a filter (docs/capfilt.md).
    """
    smoothing: float = 0.1
    """Share of the target of each written word that is spread over all words."""
    prompt: str = ""
    """What every text begins with that is written, such as "a picture of "; it is given, not learned."""
    momentum: float = 0.995
    """Share of the twin that stays in each step."""
    ring_rows: int = 57_600
    """Earlier samples whose keys are kept as negatives of the contrast."""
    distillation: float = 0.4
    """Share of the contrast's target that the twin believes, after the ramp."""
    ramp: float = 0.1
    """Share of the steps in which `distillation` rises from 0 (the authors: 2 of 20 epochs)."""
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        require(self, (
            (("space", "frame_positions", "ring_rows"), "at least 1", lambda value: value >= 1),
            (("text_positions",), "at least 3: [CLS], a word, [SEP]", lambda value: value >= 3),
            (("contrast_weight", "match_weight", "language_weight"), "at least 0", lambda value: value >= 0),
            (("momentum", "distillation"), "from 0 to 1", lambda value: 0 <= value <= 1),
            (("ramp",), "above 0 and at most 1", lambda value: 0 < value <= 1),
            (("dropout", "smoothing"), "at least 0 and below 1", lambda value: 0 <= value < 1),
            (("image_epsilon", "text_epsilon"), "above 0", lambda value: value > 0),
        ))

    def alpha(self, progress: Progress) -> float:
        """The share of the contrast's target that the twin believes by now."""
        return self.distillation * min(1.0, progress.fraction / self.ramp)


def base() -> Preset:
    """ViT-B/16 and the authors' recipe: 20 epochs of 14 M pictures, about 2,400 to a batch (their rate falls by a tenth
    an epoch, to 0.12 of its height)."""
    return Preset(
        BLIPConfig(sight=Sight(size=224, patch=16, least_area=0.2)),
        LoopConfig(steps=117_000, batch_tokens=786_432, accumulate=16, multiple=16, workers=8, save_every=1000),
        OptimConfig(learning_rate=3e-4, warmup=0.026, decay="linear", final=0.12, beta2=0.999, weight_decay=0.05),
        vocabulary_size=30_524,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    return Preset(BLIPConfig(TINY_SIGHT, TINY, TINY, space=128, text_positions=64, dropout=0.0, momentum=0.9,
                             ring_rows=512, ramp=0.2), LoopConfig(batch_tokens=16_384))


def trimodal() -> Preset:
    """`tiny` with a tower for speech."""
    preset = tiny()
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, hears=True))


class Rows(TowerRows):
    """Captions as they are read and, where there is a picture or speech, as they are written.

    host "context" (B, 2): which of them each row's text is judged and written by. targets "language": places in the
    view of what is written, and the words that follow.
    """

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality's own sequence; those of the text in three pairs, and as it is written."""
        sizes = self.sizes(lengths)
        has_context = sum(sizes.get(name, 0) for name in CONTEXTS) > 0
        return super().cost(lengths) + 4 * sizes["text"] * has_context

    def packer(self) -> Packer:
        """With a view of what is written."""
        views = {**VIEWS, WRITING: (TEXT,)}
        return Packer(1, max(self.speech_width, 1), 3 * self.config.sight.patch**2, (FRAME, PATCH), views)

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """Rows with a text and a context are judged, and written."""
        context = draw_contexts(rows)
        told = [row for row, drawn in zip(rows, context, strict=True) if "text" in row.alone and drawn.any()]
        index, label = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for row in told:
            start = self.start()
            ids = row.ids[: self.config.text_positions - len(start)]
            place = packer.sequence(WRITING, [packer.text(np.concatenate([start, ids]))])
            index.append(place.start + np.arange(len(start) - 1, place.length))
            label.append(np.append(ids, self.tokenizer.eos))
        language = Targets(torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(label)))
        return Asked({LANGUAGE: language}, counts={"match": len(told), LANGUAGE: len(language.index)},
                     host={"context": context})

    def start(self) -> np.ndarray:
        """What is given before the first word: [DEC] and the prompt."""
        return np.append(self.tokenizer.bos, self.tokenizer.encode(self.config.prompt))


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
        table = {"text": batch.text, "image": batch.patches, "audio": batch.frames}[modality]
        return self.towers[modality](table, batch.views[modality])

    def vectors(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.project[modality](states.first)


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
        words = words.take(batch.host["rows"][:, 0]).of_all_ranks().take(pairing.text)
        judged = self.network.onto(words, context.of_all_ranks(), pairing.context)
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
    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """The first state of each modality, read by itself, and the mean of all of its states, side by side."""
        parts = []
        for name in modalities:
            batch = self._inputs(samples, name)
            states = as_clips(self.encode(name, batch), name, batch)
            states_SLW, valid_SL = states.padded()
            mean_SW = (states_SLW * valid_SL[..., None]).sum(1) / valid_SL.sum(1, keepdim=True)
            parts += [states.first, mean_SW]
        return torch.cat(parts, dim=1).float()

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
