"""VLMo: one transformer, whose feed-forwards are experts of modalities, as a dual encoder and as a fusion encoder.

    text alone, picture alone, speech alone  --MultiwayStack--> first state --Projection--> contrast of each pair
    text beside its context, true pairs and hard negatives ---> first state --Pooler------> match or not
    text with hidden words, beside its context or alone ------> their states -------------> hidden words
    picture with hidden patches ------------------------------> their states -------------> their image codes

A stage (opt/recipe.py) asks some of these and moves some of the parameters. All sequences but the pairs go through the
transformer in one packed run; pairs are drawn by the contrast, so that they come second.
Shape legend: N packed tokens, S sequences, B rows, P pairs, M hidden, D width, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from opt.data.batch import Batch, View
from opt.data.tokenizer import Tokenizer
from opt.nn.compiled import uncompiled
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Pooler, Projection, Temperature, TokenHead
from opt.nn.init import by_width
from opt.nn.multiway import MultiwayStack, Route, sorted_layout
from opt.nn.relative import Bias, RelativePositions
from opt.nn.states import ABSENT, States
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.systems.shared.asking import asked
from opt.systems.shared.codes import require_codes
from opt.systems.shared.matching import CONTEXTS, odds, pair_up
from opt.systems.shared.momentum import Contrasted, by_row, gathered
from opt.systems.shared.multiway import MultiwaySystem
from opt.systems.shared.pairs import contrasts
from opt.systems.shared.stages import train_only
from opt.systems.system import MODALITIES, DataFacts, Output, Progress
from opt.systems.vlmo.config import CONTRAST, MATCH, PATCHES, WORDS, VLMoConfig
from opt.systems.vlmo.rows import Rows

OWN, FUSED = "own", "fused"
"""The spaces of a contrast: of states behind the experts of modalities, and behind the fused ones."""


class Space(nn.Module):
    """A space that modalities share: a projection of each, and the temperature of their contrast."""

    def __init__(self, modalities: Sequence[str], width: int, space: int) -> None:
        super().__init__()
        self.project = nn.ModuleDict({name: Projection(width, space) for name in modalities})
        self.temperature = Temperature()

    def forward(self, modality: str, first_SD: Tensor) -> Tensor:
        """Unit vectors (S, E) of first states."""
        return cast(Tensor, self.project[modality](first_SD))


class VLMo(MultiwaySystem):
    """Mixture-of-modality-experts (arXiv 2111.02358)."""

    name = "vlmo"
    config_type = VLMoConfig
    reads_codes: ClassVar[bool] = True

    def __init__(self, config: VLMoConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        if PATCHES in config.asks:
            require_codes(config.sight, facts)
        sizes, epsilon = config.encoder, config.norm_epsilon
        self.embedders = self._embedders()
        self.positions = RelativePositions(
            config.sight.grid, config.text_positions, config.frame_positions if config.hears else 0, sizes.heads,
            sizes.layers,
        ) if config.positions == "relative" else None  # fmt: skip
        self.stack = MultiwayStack(sizes.width, sizes.heads, sizes.inner, config.switches, {}, config.layer_scale,
                                   epsilon=epsilon)
        self.spaces = nn.ModuleDict({name: Space(config.reads, sizes.width, config.space)
                                     for name in ((OWN, FUSED) if config.contrasts == "code" else (OWN,))})
        self.pooler = Pooler(sizes.width)
        self.match_head = nn.Linear(sizes.width, 2)
        self.word_head = TokenHead(sizes.width, tokenizer.size, epsilon)
        self.code_head = nn.Linear(sizes.width, facts.codebook) if facts.codebook else None
        self.begin_answering(sizes.width)
        self.apply(by_width)
        self._begin_stage()

    def _embedders(self) -> nn.ModuleDict:
        """Of words, patches and frames; with relative positions none of them has a table of places."""
        config, epsilon = self.config, self.config.norm_epsilon
        width, placed = config.encoder.width, config.positions == "absolute"
        embedders: dict[str, nn.Module] = {
            "text": TextEmbedder(self.tokenizer.size, config.text_positions, width, 0.0, epsilon, placed=placed),
            "image": PatchEmbedder(config.sight, width, masks=self.facts.codebook > 0, placed=placed),
        }
        if config.hears:
            embedders["audio"] = FrameEmbedder(max(self.facts.speech_width, 1), config.frame_positions, width, 0.0,
                                               epsilon, first=True, masks=False, placed=placed)
        return nn.ModuleDict(embedders)

    def _begin_stage(self) -> None:
        """Heads that none of the objectives asks, and what the stage does not train, stay as they are."""
        config, image = self.config, self.embedders["image"]
        assert isinstance(image, PatchEmbedder)
        heads = {CONTRAST: (self.spaces,), MATCH: (self.match_head,), WORDS: (self.word_head,),
                 PATCHES: (self.code_head, image.mask)}
        idle = [head for name, each in heads.items() if name not in config.asks for head in each if head is not None]
        if MATCH not in config.asks and config.tuning.task == "pretraining":
            idle.append(self.pooler)
        for head in idle:
            head.requires_grad_(False)
        if config.tuning.task == "pretraining":
            train_only(self, config.stage)

    def preparer(self) -> Any:
        """Samples -> sequences of the stage: `Rows`, or questions, where it is tuned for them."""
        return asked(Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities), self.config.tuning)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Everything but pairs in one run; then the pairs that the contrast drew."""
        if "answer" in batch.targets:
            return self.answered(batch)
        entries, terms = self.embedded(batch), dict[str, Term]()
        states = self._read(embedding(batch.views["encoder"].gather, entries), batch.views["encoder"])
        if WORDS in self.config.asks:
            terms |= self._hidden_words(states[OWN], batch)
        if PATCHES in self.config.asks:
            terms |= self._hidden_patches(states[OWN], batch)
        vectors: dict[str, Tensor] = {}
        if CONTRAST in self.config.asks:
            vectors, aligned = self._contrast(states, batch)
            terms |= aligned
        if MATCH in self.config.asks:
            terms |= self._match(vectors, entries, batch)
        return Output(terms)

    def _read(self, entries_ND: Tensor, view: View) -> dict[str, Tensor]:
        """States of every token (N, D), by the space that they are for."""
        if FUSED not in self.spaces:
            return {OWN: self.read(entries_ND, view)}
        route, bias, top = Route.of(view), self.bias(view), -self.config.fused_layers
        layout = sorted_layout(view, route)
        lower_ND = self.stack.run(entries_ND[route.order], layout, route, bias, last=top)
        return {name: self.stack.normed(self.stack.run(lower_ND, layout, each, bias, first=top), route)
                for name, each in ((OWN, route), (FUSED, route.as_fused()))}

    def _hidden_words(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MLM: whole words, read off the context too (section 3.2)."""
        target, text = batch.targets[WORDS], cast(TextEmbedder, self.embedders["text"])
        logits_MV = self.word_head(embedding(target.index, hidden_ND), text.token.weight)
        weight = self.config.mlm_weight if len(self.config.asks) > 1 else 1.0
        return {WORDS: token_cross_entropy(logits_MV, target.label, batch.counts[WORDS], weight=weight)}

    def _hidden_patches(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MIM: the image codes of hidden patches (BEiT, arXiv 2106.08254, section 2.3)."""
        assert self.code_head is not None
        target = batch.targets[PATCHES]
        logits_MV = self.code_head(embedding(target.index, hidden_ND))
        return {PATCHES: token_cross_entropy(logits_MV, target.label, batch.counts[PATCHES])}

    def _contrast(self, states: Mapping[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Term]]:
        """ITC: unit vectors of every sequence by modality (S, E) in the space of negatives, and the terms."""
        vectors: dict[str, dict[str, Tensor]] = {}
        terms: dict[str, Term] = {}
        for name, hidden_ND in states.items():
            space, first_SD = self.space(name), hidden_ND[batch.views["encoder"].first]
            vectors[name] = found = {modality: space(modality, first_SD) for modality in self.modalities}
            aligned = contrasts(partial(_picked, found), self.modalities, batch, space.temperature(), 1 / len(states))
            terms |= {each if name == OWN else f"{each}_{name}": term for each, term in aligned.items()}
        return vectors[OWN], terms

    def _match(self, vectors: Mapping[str, Tensor], entries: Tensor, batch: Batch) -> dict[str, Term]:
        """ITM: true pairs and negatives of all ranks, hard ones where there is a contrast, in one run."""
        rows = {name: batch.host["rows"][:, MODALITIES.index(name)] for name in self.modalities}
        if vectors:
            online, scale = {name: by_row(vectors[name], rows[name]) for name in rows}, self.space(OWN).temperature()
        else:
            online, scale = dict.fromkeys(rows, entries.new_zeros(len(batch.keys), 1)), entries.new_zeros(1)
        keys = {name: gathered(each.detach()) for name, each in online.items()}
        pairing = pair_up(Contrasted({}, online, keys, gathered(batch.extra["picture"]), {}), batch, scale)
        view = self.own(batch)
        alone = States.of(embedding(view.gather, entries), view)
        with uncompiled():  # pairs are drawn on the device: so many tokens as nobody foresees
            parts = {"text": alone.take(rows["text"]).of_ranks(pairing.text)}
            for place, name in enumerate(CONTEXTS):
                if name in rows:
                    used = np.where(batch.host["context"][:, place], rows[name], ABSENT)
                    parts[name] = alone.take(used).of_ranks(pairing.context)
            odds_P = odds(self.match_head(self.pooled(parts)))
        return {MATCH: pairing.term(odds_P, batch.counts[MATCH])}

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps temperatures in their range."""
        for name in self.spaces:
            self.space(name).temperature.clamp()

    def space(self, name: str) -> Space:
        """The space OWN, or FUSED where the contrast is the code's."""
        return cast(Space, self.spaces[name])

    def bias(self, view: View) -> Bias | None:
        """Of relative positions."""
        positions = self.positions
        return None if positions is None else positions(view)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.space(OWN)(modality, states.first)

    @torch.inference_mode()
    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Log-odds of the matching head. Raises UserError for fewer than two modalities."""
        self.require_parts(parts)
        return odds(self.match_head(self.pooled({name: parts[name].take(rows[name]) for name in parts})).float())

    @property
    def cosine_weight(self) -> float:
        """1 / temperature: negatives were drawn by the contrast, so that matching says what its logit does not."""
        return float(self.space(OWN).temperature().detach())

    @property
    def extractors(self) -> frozenset[str]:
        """Image codes only in a stage that asks for hidden patches."""
        return super().extractors - (frozenset() if PATCHES in self.config.asks else {"codes"})


def _picked(vectors: Mapping[str, Tensor], modality: str, sequences: Tensor) -> Tensor:
    """Vectors of some sequences of a modality."""
    return vectors[modality][sequences]
