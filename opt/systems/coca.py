"""CoCa (arXiv 2205.01917): one decoder cut in two. Its lower half reads the text alone, its upper half looks at what
attentional poolers found in the picture; one forward gives the contrast and the caption.

    image  [class] patches ----- Stack --Poolers--> 1 query   --Projection--> (S, E) \\
    audio  [class] frames  ----- Stack --Poolers--> (where it hears)                  > contrast of each pair
    text   [BOS] words [EOS] [CLS] --lower half---> [CLS]     --Projection--> (S, E) /
                |                  (causal Stack)
                +-- [BOS] words --upper half (causal; looks at the generative queries)--> next words

[CLS] is learned, stands last and sees all words; nothing sees it, and the upper half is not given it.
Shape legend: S sequences, N words (those that are asked what follows), Q queries, D width, E shared space, M context
tokens, R rows of the decoder, V words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

from opt.data.batch import Batch, TextTable
from opt.data.pack import FRAME, PATCH, TEXT, Packer, Part, Place
from opt.data.pixels import Sight
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.block import Activation, Block, BlockCache, Stack
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Projection, Temperature
from opt.nn.init import by_width
from opt.nn.pool import AttentionalPooler
from opt.nn.sampling import Sampling
from opt.nn.states import ABSENT, States, beside, onto
from opt.nn.towers import Tower
from opt.nn.writing import write
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.shared.asking import Answering, AskedRows, asked
from opt.systems.shared.config import TINY, TINY_SIGHT, Sizes, require
from opt.systems.shared.pairs import contrasts
from opt.systems.shared.rows import VIEWS, Asked, TowerRow, TowerRows
from opt.systems.shared.tuning import Tuning
from opt.systems.system import DataFacts, Output, Preset, Progress

Pooling = Literal["cascade", "parallel", "shared"]
SOURCES = ("image", "audio")
"""What captions are written from, in the order in which the upper half sees it."""


@dataclass(frozen=True)
class CoCaConfig:
    """Sizes of the towers, the poolers and the decoder. Raises UserError for values out of range."""

    sight: Sight = Sight(size=288, patch=18, fit="crop")
    image: Sizes = Sizes()
    text: Sizes = Sizes()
    """Of the decoder; `layers` are those of its lower half."""
    audio: Sizes = Sizes(width=512, heads=8, inner=2048)
    """Of the speech tower, where it hears."""
    hears: bool = False
    """Has a tower and poolers for speech, the contrast of all three pairs, and writes from speech too (not in the
    paper)."""
    decoder_layers: int = 12
    """Of the decoder's upper half: each is self-attention and cross-attention, with a feed-forward behind either."""
    pooling: Pooling = "cascade"
    """What the contrastive query looks at: the generative queries' findings (the paper's choice), or the picture too,
    with weights of its own (parallel) or those of the generative ones, beside which it stands (shared: open_clip's
    published weights)."""
    queries: int = 256
    """Generative queries of a picture's pooler."""
    speech_queries: int = 64
    """The same of a recording's."""
    pooler_heads: int = 8
    """Attention heads of all poolers."""
    space: int = 512
    """Width of the shared space."""
    text_positions: int = 76
    """Longest text in tokens, [BOS] and [EOS] included, [CLS] not; longer captions are cut."""
    frame_positions: int = 256
    """Longest speech in frames; longer recordings are cut."""
    contrast_weight: float = 1.0
    """Of each contrast in the loss."""
    caption_weight: float = 2.0
    """Of the captions in the loss (section 3.2: 2)."""
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-5
    tuning: Annotated[Tuning, Fixed, Suppress] = Tuning()
    """What the model was fine-tuned for."""

    def __post_init__(self) -> None:
        counts = ("decoder_layers", "queries", "speech_queries", "pooler_heads", "space", "frame_positions")
        require(self, (
            (counts, "at least 1", lambda value: value >= 1),
            (("pooler_heads",), f"a divisor of the text's width {self.text.width}",
             lambda value: value < 1 or self.text.width % value == 0),
            (("text_positions",), "at least 3: [BOS], a word, [EOS]", lambda value: value >= 3),
            (("contrast_weight", "caption_weight", "norm_epsilon"), "above 0", lambda value: value > 0),
        ))


def base() -> Preset:
    """The paper's Base and recipe, with AdamW where the paper has Adafactor, and at a batch that one machine holds (the
    paper's has 65,536 pairs). 445 M parameters: the paper's 383 M, the poolers, and a second feed-forward in each layer
    of the upper half, as open_clip has it."""
    return Preset(
        CoCaConfig(),
        LoopConfig(steps=500_000, batch_tokens=65_536, workers=8, save_every=1000),
        OptimConfig(learning_rate=8e-4, warmup=0.02, decay="linear", final=0.0, beta2=0.999, weight_decay=0.01),
        vocabulary_size=64_000,
    )


def tiny() -> Preset:
    """A small model for two CPU cores and spoken scenes."""
    model = CoCaConfig(TINY_SIGHT, TINY, TINY, TINY, decoder_layers=2, queries=16, speech_queries=8, pooler_heads=4,
                       space=128, text_positions=64)
    return Preset(model, LoopConfig(batch_tokens=16_384))


def trimodal() -> Preset:
    """`tiny` with a tower for speech, whose pooled frames the upper half looks at beside the picture's."""
    return replace(tiny(), model=replace(tiny().model, hears=True))


class Rows(TowerRows):
    """A text's sequence is [BOS] words [EOS] [CLS]; a row with a caption and something to write it from has a writing.

    writing "caption": `ids` are places of words among the text view's tokens, `label` the words behind them; it looks
    at the pooled queries of host "contexts" (captions, sources), sequences of pictures and speech, one row behind the
    other.
    """

    def sequence(self, ids: np.ndarray) -> np.ndarray:
        """[BOS] words [EOS]."""
        return np.concatenate([[self.tokenizer.bos], ids, [self.tokenizer.eos]])

    def packer(self) -> Packer:
        """[CLS] is the learned first entry of the words."""
        return Packer(1, max(self.speech_width, 1), 3 * self.config.sight.patch**2, (TEXT, FRAME, PATCH), VIEWS)

    def parts(
        self, packer: Packer, sample: Sample, modalities: Sequence[str], rng: np.random.Generator | None = None
    ) -> tuple[dict[str, Part], np.ndarray, dict[str, Place]]:
        """As in every system with towers, the text's sequence ending in [CLS]."""
        parts, ids, alone = super().parts(packer, sample, [name for name in modalities if name != "text"], rng)
        if "text" in modalities and sample.caption:
            ids = self.words(sample.caption)
            parts["text"] = packer.text(self.sequence(ids))
            alone["text"] = packer.sequence("text", [parts["text"], packer.first(TEXT)])
        return parts, ids, alone

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """What each caption is written from, drawn where there is a choice: the picture, the speech, or both."""
        queries = {"image": self.config.queries, "audio": self.config.speech_queries}
        contexts, begin = list[list[int]](), 0
        for row in rows:
            found = [name for name in SOURCES if name in row.alone]
            if "text" not in row.alone or not found:
                continue
            if len(found) == 2 and (drawn := row.rng.integers(3)) < 2:
                found = [SOURCES[drawn]]
            ids, length = self.sequence(row.ids), sum(queries[name] for name in found)
            packer.write("caption", row.alone["text"].start + np.arange(len(ids) - 1), ids[1:],
                         Place(len(contexts), begin, length))
            contexts.append([row.alone[name].number if name in found else ABSENT for name in SOURCES])
            begin += length
        return Asked(host={"contexts": np.array(contexts, np.int64).reshape(-1, 2)}, writings=("caption",))

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of all towers, and the words once more where they are written."""
        sizes = self.sizes(lengths)
        written = sizes["text"] * (sum(sizes[name] for name in SOURCES if name in sizes) > 0)
        return super().cost(lengths) + (sizes["text"] > 0) + written


class Words(TextEmbedder):
    """Ids of words, behind a learned entry 0: [CLS], which always has the same place, so that it needs no position."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__(vocabulary, positions, width, 0.0, bare=True)
        self.first = nn.Parameter(torch.randn(1, width) * 0.02)

    def forward(self, text: TextTable) -> Tensor:
        """(1 + N, D)."""
        return torch.cat([self.first, super().forward(text)])


class Poolers(nn.Module):
    """What a tower saw, found by learned queries: many for the captions, one for the contrast (section 3.2)."""

    def __init__(self, config: CoCaConfig, queries: int, token_width: int) -> None:
        super().__init__()
        width, heads, epsilon = config.text.width, config.pooler_heads, config.norm_epsilon
        self.cascade, shared = config.pooling == "cascade", config.pooling == "shared"
        self.generative = AttentionalPooler(width, heads, queries + shared, token_width, epsilon)
        self.contrastive = None if shared else AttentionalPooler(
            width, heads, 1, width if self.cascade else token_width, epsilon)
        self.norm = nn.LayerNorm(width, epsilon) if shared else nn.Identity()

    def forward(self, tokens: States) -> tuple[States, Tensor]:
        """Findings of the generative queries, S sequences of Q, and of the contrastive one (S, D)."""
        found = self.generative(tokens)
        if self.contrastive is not None:
            return found, self.contrastive(found if self.cascade else tokens).hidden
        found_SQD = self.norm(found.hidden).unflatten(0, (len(tokens), len(self.generative.query)))
        return States(found_SQD[:, 1:].flatten(0, 1), found.lengths - 1), found_SQD[:, 0]


class CoCa(Answering):
    """Contrastive Captioner."""

    name = "coca"
    config_type = CoCaConfig

    def __init__(self, config: CoCaConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        text, image, epsilon = config.text, config.image, config.norm_epsilon
        seen = PatchEmbedder(config.sight, image.width, bias=False, first_norm=True, epsilon=epsilon)
        self.towers = nn.ModuleDict({
            "text": Tower(Words(tokenizer.size, config.text_positions, text.width),
                          self._stack(text, final_norm=False, causal=True)),
            "image": Tower(seen, self._stack(image, final_norm=config.pooling != "shared")),
        })
        self.poolers = nn.ModuleDict({"image": Poolers(config, config.queries, image.width)})
        if config.hears:
            heard = FrameEmbedder(max(facts.speech_width, 1), config.frame_positions, config.audio.width, 0.0, epsilon,
                                  first=True, masks=False)
            self.towers["audio"] = Tower(heard, self._stack(config.audio, final_norm=config.pooling != "shared"))
            self.poolers["audio"] = Poolers(config, config.speech_queries, config.audio.width)
        self.text_norm = nn.LayerNorm(text.width, epsilon)
        self.project = nn.ModuleDict({name: Projection(text.width, config.space) for name in self.modalities})
        self.temperature = Temperature()
        self.upper = self._upper()
        self.next_word = nn.Linear(text.width, tokenizer.size, bias=False)
        self.begin_answering(text.width)
        self.apply(by_width)
        for module in (self.next_word, *self.poolers.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def preparer(self) -> Rows | AskedRows:
        """Samples -> a sequence a modality, and captions to write; or questions."""
        return asked(Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities), self.config.tuning)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Each modality once; then the contrast of each pair, and the words that follow."""
        if batch.parts:
            return self.answered(batch)
        states = {name: self.encode(name, batch) for name in self.modalities}
        pooled = {name: self.poolers[name](states[name]) for name in self.poolers}
        summaries = {"text": self.summary("text", states["text"]), **{name: one for name, (_, one) in pooled.items()}}
        found = {name: tokens for name, (tokens, _) in pooled.items()}
        return Output(self.contrast(summaries, batch) | self.caption(states["text"], found, batch))

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps the temperature in its range."""
        self.temperature.clamp()

    def vector(self, modality: str, states: States) -> Tensor:
        """By what sums it up: (S, E)."""
        return self.project[modality](self.summary(modality, states))

    def summary(self, modality: str, states: States) -> Tensor:
        """What the contrast reads, before its projection: [CLS] of a text, the findings of the contrastive query of
        anything else, (S, D)."""
        return self.text_norm(states.last) if modality == "text" else self.poolers[modality](states)[1]

    def pooled(self, parts: Mapping[str, States]) -> Tensor:
        """The upper half's state of the last word (P, D), which has seen all words and the context (section 3.3)."""
        text, seen = parts["text"], [name for name in SOURCES if name in parts]
        words = text.shortened(1)
        found = beside([self.poolers[name](parts[name])[0] for name in seen])
        looks = onto(words.lengths, found.lengths, text.hidden.device)
        return States(self.upper(words.hidden, words.layout, found.hidden, looks), words.lengths).last

    @torch.inference_mode()
    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        """By the decoder, looking at what the generative queries find in pictures, speech or both; in all pictures of a
        clip at once (section 3.3)."""
        if strange := [name for name in modalities if name not in self.poolers]:
            raise self._cannot(f"write text from {strange[0]}, only from {' and '.join(self.poolers)}")
        found = [self.poolers[name](self.alone(samples, name))[0] for name in SOURCES if name in modalities]
        limit = min(sampling.limit, self.config.text_positions - 1)
        ids_BL = write(CaptionWriter(self), *beside(found).padded(), [self.tokenizer.bos], self.tokenizer.eos, limit,
                       sampling.for_text(), [sample.key for sample in samples])
        return [self.tokenizer.decode(ids) for ids in ids_BL.cpu().numpy()]

    def contrast(self, summaries: dict[str, Tensor], batch: Batch) -> dict[str, Term]:
        """Of each pair of modalities (section 3.2)."""
        vectors = {name: self.project[name](summary) for name, summary in summaries.items()}
        return contrasts(lambda name, rows: vectors[name][rows], self.modalities, batch, self.temperature(),
                         self.config.contrast_weight)

    def caption(self, text: States, found: dict[str, States], batch: Batch) -> dict[str, Term]:
        """The next word at every word (Eq. 3): states of the lower half go on through the upper, which looks at what
        the generative queries found."""
        writing, contexts = batch.writings["caption"], batch.host["contexts"]
        context = beside([found[name].take(contexts[:, SOURCES.index(name)]) for name in found])
        hidden_ND = self.upper(
            nn.functional.embedding(writing.ids, text.hidden), writing.layout,
            nn.functional.embedding(writing.seen, context.hidden), writing.context,
        )
        return {"caption": token_cross_entropy(self.next_word(hidden_ND), writing.label, batch.counts["caption"],
                                               weight=self.config.caption_weight)}

    def _stack(self, sizes: Sizes, final_norm: bool, causal: bool = False) -> Stack:
        stack = Stack(sizes.layers, sizes.width, sizes.heads, sizes.inner, 0.0, causal=causal,
                      epsilon=self.config.norm_epsilon, activation=self.config.activation)
        if not final_norm:
            stack.final_norm = nn.Identity()
        return stack

    def _upper(self) -> Stack:
        """Blocks in turn: one that looks back, one that looks at the context."""
        text, epsilon = self.config.text, self.config.norm_epsilon
        stack = Stack(0, text.width, text.heads, text.inner, 0.0, epsilon=epsilon)
        for own in (True, False) * self.config.decoder_layers:
            stack.blocks.append(Block(text.width, text.heads, text.inner, 0.0, own=own, causal=own, cross=not own,
                                      context_norm=not own, epsilon=epsilon, activation=self.config.activation))
        return stack


class CaptionWriter:
    """Both halves of the decoder over cached keys and values: a `Writer` (opt/nn/writing.py)."""

    def __init__(self, system: CoCa) -> None:
        text = cast(Tower, system.towers["text"])
        self.words, self.lower, self.upper = cast(Words, text.embedder), text.stack, system.upper
        self.next_word, self.vocabulary = system.next_word, system.tokenizer.size

    def start(self, context_BMD: Tensor, valid_BM: Tensor, length: int, beams: int = 1) -> list[BlockCache]:
        """Caches of all blocks, the lower half's first."""
        return [cache for half in (self.lower, self.upper)
                for cache in half.start(context_BMD, valid_BM, length, beams)]

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], parents_R: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the next word."""
        if parents_R is not None:
            for cache in caches:
                cache.follow(position, parents_R)
        hidden_RD, lower = self.words.at(ids_R, torch.full_like(ids_R, position)), len(self.lower.blocks)
        hidden_RD = self.lower.step(hidden_RD, position, caches[:lower])
        return self.next_word(self.upper.step(hidden_RD, position, caches[lower:]))
