"""The model: contrast with a twin's keys, edits, and what is learned of them.

Shape legend: S sequences, R rows with an edited text, N tokens of edited texts, W words of them, M edited ones,
L words of one text, V vocabulary, D width, E shared space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from opt.config import UserError
from opt.data.batch import Batch, TextTable
from opt.data.record import Sample
from opt.data.stored import key_hash
from opt.data.tokenizer import Tokenizer
from opt.nn.editor import Editor, open_words, whole_words
from opt.nn.init import by_width
from opt.nn.momentum import Twin
from opt.nn.states import ABSENT, States
from opt.objectives.correction import averaged, correction, detection, draw_edits
from opt.objectives.masked import token_cross_entropy
from opt.objectives.term import Term
from opt.systems.shared.encoders import TEXT_EPSILON
from opt.systems.shared.matching import CONTEXTS, usable
from opt.systems.shared.momentum import MomentumContrast
from opt.systems.shared.proofreading import Edit, Word, as_words
from opt.systems.shared.towers import TowerSystem
from opt.systems.system import DataFacts, Output, Progress
from opt.systems.vilem.config import ViLEMConfig
from opt.systems.vilem.networks import Encoders, Gist, Looks, Seen, word_places
from opt.systems.vilem.rows import Rows


class ViLEM(TowerSystem):
    """Visual-Language Error Modeling.

    `embed` and `features` are the model's own. The authors score a picture by the model against a text by the twin, and
    the other way round; at the end of training, where the rate is low, the two are nearly the same.
    """

    name = "vilem"
    config_type = ViLEMConfig
    editable: Tensor

    def __init__(self, config: ViLEMConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self.encoders = Encoders(config, tokenizer.size, facts.speech_width)
        self.open_words, self.filled = open_words(tokenizer), False
        self.learner: Editor | None = None
        if config.edits != "none":
            self.gist = Gist(self.modalities, config.image.width, config.text.width)
            sizes, taught = config.editor, config.editor_share > 0
            editor = Editor(tokenizer.size, config.text_positions, sizes.layers, sizes.width, sizes.heads, sizes.inner,
                            TEXT_EPSILON, taught)
            self.learner = editor if taught else None
            self.editor = Twin(editor.apply(by_width), momentum=0.0)
            self.register_buffer("editable", torch.from_numpy(self.open_words), persistent=False)
            if self.open_words.sum() < 2:
                raise UserError(f"a vocabulary of {tokenizer.size} tokens has no two words to change for one another; "
                                "give a larger one, or --model.edits none")
        self.encoders.apply(by_width)
        self.twin = Twin(self.encoders, config.momentum)
        self.contrast = MomentumContrast(self.modalities, config.space, config.ring_rows)

    def preparer(self) -> Rows:
        """Samples -> a sequence a modality, and texts to be edited."""
        return Rows(self.config, self.tokenizer, self.facts.speech_width, self.modalities, self.open_words)

    @property
    def kept(self) -> Encoders:
        """The twin, for calls of its methods."""
        return cast(Encoders, self.twin.copy)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Contrast of clean texts; then edits, and each of them judged by parts of the picture or speech and by the
        whole."""
        seen, vectors = self._each(self.encoders, batch)
        with torch.no_grad():
            kept_seen, kept_vectors = self._each(self.kept, batch)
        contrast = self.contrast(vectors, kept_vectors, batch, self.config.alpha(progress))
        if self.config.edits == "none":
            return Output(contrast.terms, contrast.carry)
        learning = progress.fraction < self.config.editor_share
        terms, edited_M = self._edit(batch, learning)
        terms |= self._judged(batch, seen, kept_seen, edited_M)
        return Output({**contrast.terms, **terms},
                      {**contrast.carry, "learning": torch.full((), learning, device=edited_M.device)})

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """The twin follows, the ring takes in the twin's vectors, the temperature stays in its range; the editor is
        what has learned to edit, and from then on that learning is over, nothing moves it. Raises UserError after the
        first step by an editor that never learns and has not been filled."""
        self.twin.update(self.encoders, kept)
        if self.learner is not None:
            self.editor.update(self.learner, kept & carries[0]["learning"])
        elif self.config.edits != "none":
            self._require_filled()
        self.contrast.after_step(carries, kept)

    def encode(self, modality: str, batch: Batch) -> States:
        """One modality's sequences through its tower; a text looks at nothing."""
        return self.encoders.encode(modality, batch)

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.encoders.vector(modality, states)

    @torch.inference_mode()
    def wrong_words(self, samples: Sequence[Sample], modalities: Sequence[str]) -> list[list[Word]]:
        """Of each sample the words of its caption, judged by its first picture ("image") or by its speech ("audio"): by
        the local branch, the model's text with what the twin sees, as it was trained."""
        named = [name for name in CONTEXTS if name in modalities]
        if self.config.edits == "none" or len(named) != 1:
            raise self._cannot("find wrong words without --model.edits, nor by more or less than a picture or speech")
        text = self._inputs(samples, "text")
        firsts = [dataclasses.replace(sample, pictures=sample.pictures[:1]) for sample in samples]
        seen = {named[0]: self.kept.see(named[0], self._inputs(firsts, named[0]))}
        rows = np.where(np.array(CONTEXTS) == named[0], np.arange(len(samples))[:, None], ABSENT)
        texts = self.encoders.entries(text.text, text.views["text"])
        word_W = torch.from_numpy(word_places(texts.lengths)).to(self.device)
        hidden_ND = self.encoders.read_local(texts.hidden, seen, Looks.of(texts, rows, seen))
        logits_W2, logits_WV = self.encoders.judge(hidden_ND, word_W, word_W)
        written_W = text.text.ids[text.views["text"].gather[word_W]]
        other_WV = logits_WV.masked_fill(~self.editable, float("-inf")).scatter(1, written_W[:, None], float("-inf"))
        wrong_W, proposed_W = logits_W2.float().softmax(dim=1)[:, 0].tolist(), other_WV.argmax(dim=1).tolist()
        ends = np.cumsum(texts.lengths - 2)[:-1]
        of_texts = (np.split(np.array(each), ends) for each in (written_W.tolist(), wrong_W, proposed_W))
        return [as_words(self.tokenizer, *each) for each in zip(*of_texts, strict=True)]

    @torch.inference_mode()
    def edited_captions(self, samples: Sequence[Sample], seed: int) -> list[Edit | None]:
        """Each caption with one word changed, a whole one for a whole one, by the editor."""
        rows, chosen = self.preparer(), [self._choose(sample, seed) for sample in samples]
        if not (asked := [(sample, *choice) for sample, choice in zip(samples, chosen, strict=True) if choice]):
            return [None] * len(samples)
        packer, index = rows.packer(), []
        for _, ids, place, _ in asked:
            masked = ids.copy()
            masked[place] = self.tokenizer.mask
            index.append(packer.sequence("masked", [packer.text(rows.sequence(masked))]).start + 1 + place)
        batch = packer.batch([sample.key for sample, *_ in asked], {}, {}, {}).to(self.device)
        original, key = (torch.tensor(each, device=self.device) for each in zip(
            *((int(ids[place]), key) for _, ids, place, key in asked), strict=True))
        logits_MV = self.editor(batch.text, batch.views["masked"], torch.tensor(index, device=self.device))
        whole_V = self.editable & torch.from_numpy(whole_words(self.tokenizer)).to(self.device)
        edited = iter(draw_edits(logits_MV, original, whole_V, key, self.config.candidates).tolist())
        return [self._changed(choice[0], choice[1], next(edited)) if choice else None for choice in chosen]

    def _choose(self, sample: Sample, seed: int) -> tuple[np.ndarray, int, int] | None:
        """A caption's ids, the place of a whole word among them, and a random number; None where it has none."""
        ids = self.preparer().words(sample.caption or "")
        word_L = self.tokenizer.words_of(ids)
        whole = np.flatnonzero((np.bincount(word_L)[word_L] == 1) & self.open_words[ids])
        rng = np.random.default_rng((seed, key_hash(f"{sample.key} {sample.caption}")))
        return (ids, int(rng.choice(whole)), int(rng.integers(2**63))) if len(whole) else None

    def _changed(self, ids: np.ndarray, place: int, word: int) -> Edit | None:
        """None where the changed text would be read as other words."""
        changed = ids.copy()
        changed[place] = word
        caption, (original, edited) = self.tokenizer.decode(changed), (self.tokenizer.decode([each]) for each in (
            ids[place], word))
        if not np.array_equal(self.tokenizer.encode(caption), changed):
            return None
        return Edit(caption, int(self.tokenizer.words_of(ids)[place]), original, edited)

    def _each(self, encoders: Encoders, batch: Batch) -> tuple[dict[str, Seen], dict[str, Tensor]]:
        """What pictures and speech are at several depths, and the vectors of each modality."""
        seen = {name: encoders.see(name, batch) for name in self.modalities if name in CONTEXTS}
        states = {"text": encoders.encode("text", batch), **{name: each.states for name, each in seen.items()}}
        return seen, {name: encoders.vector(name, each) for name, each in states.items()}

    def _edit(self, batch: Batch, learning: bool) -> tuple[dict[str, Term], Tensor]:
        """The words that take the place of others (M,), by an editor that is still learning or is frozen, and what it
        learns: to say what stood there."""
        place, view = batch.targets["edit"], batch.views["masked"]
        terms: dict[str, Term] = {}
        if self.learner is not None:
            own_MV = self.learner(batch.text, view, place.index) if learning else self.learner.idle(place.index.device)
            terms["edit"] = token_cross_entropy(own_MV, place.label[: len(own_MV)], batch.counts["edit"])
        logits_MV = own_MV if learning else self.editor(batch.text, view, place.index)
        return terms, draw_edits(logits_MV, place.label, self.editable, batch.extra["edit_key"], self.config.candidates)

    def _judged(self, batch: Batch, seen: Mapping[str, Seen], kept_seen: Mapping[str, Seen], edited_M: Tensor
                ) -> dict[str, Term]:
        """Detection and correction by both branches. The model's texts are judged by what the twin sees; the twin's by
        what the model sees, so that towers of pictures and speech learn from the same mistakes."""
        view, count, own = batch.views["edited"], batch.counts["edit"], usable(batch)
        table = TextTable(batch.text.ids.scatter(0, batch.extra["edit_entry"], edited_M), batch.text.positions)
        texts, kept_texts = (encoders.entries(table, view) for encoders in (self.encoders, self.kept))
        rows = np.where(batch.host["context"][own], batch.host["rows"][own][:, 1:], ABSENT)
        looks = Looks.of(texts, rows, seen)
        word_W = torch.from_numpy(word_places(texts.lengths)).to(edited_M.device)
        entry_W = view.gather[word_W]
        wrong_W, label_M = table.ids[entry_W] != batch.text.ids[entry_W], batch.targets["edit"].label
        hidden = {
            "local": (self.encoders.read_local(texts.hidden, kept_seen, looks),
                      self.kept.read_local(kept_texts.hidden, seen, looks)),
            "global": (self.encoders.read_global(texts.hidden, self.gist(kept_seen, looks), looks),
                       self.kept.read_global(kept_texts.hidden, self.gist(seen, looks), looks)),
        }
        terms = {}
        for name, weight in (("local", 1 - self.config.beta), ("global", self.config.beta)):
            judged = [encoders.judge(each, word_W, batch.extra["edit_place"])
                      for encoders, each in zip((self.encoders, self.kept), hidden[name], strict=True)]
            terms[f"detect_{name}"] = averaged(*(detection(said, wrong_W, count, weight) for said, _ in judged))
            terms[f"correct_{name}"] = averaged(*(correction(said, label_M, edited_M != label_M, count, weight)
                                                  for _, said in judged))
        return terms

    def _require_filled(self) -> None:
        self.filled = self.filled or bool(cast(Editor, self.editor.copy).taught)  # waits for the device once
        if not self.filled:
            raise UserError("the editor is new, and with --model.editor-share 0 it never learns: begin with a BERT "
                            "(--start bert:FOLDER), or give --model.editor-share 0.2")
