"""VLMo's preparer: each modality of a sample by itself, and masked sequences, all in one packed run of the encoder.

    [CLS] words [SEP]     [class] patches     [class] frames      each by itself, for contrast and for pairs
    [CLS] words with holes [SEP]  [class] patches  [class] frames  beside its context, or alone where it has none
    [class] patches with holes

    targets "mlm", "mim"    hidden words, hidden patches' image codes, among the tokens of the view "encoder"
    host "context" (B, 2)   which of picture and speech a row's text is matched with, and read beside

What the stage does not ask is not there: without contrast nothing is encoded by itself, and the sequences that pairs
are made of stand in a view of their own, "parts", which is only embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opt.data import corrupt
from opt.data.batch import Targets
from opt.data.pack import Packer, Part, Place
from opt.data.record import Lengths, Sample
from opt.systems.shared.codes import codes_of
from opt.systems.shared.matching import CONTEXTS, draw_contexts
from opt.systems.shared.multiway import PARTS, MultiwayRows
from opt.systems.shared.rows import Asked, TowerRow
from opt.systems.vlmo.config import CONTRAST, MATCH, PATCHES, WORDS


@dataclass
class Hidden:
    """Places among the encoder's tokens, and what stood there."""

    index: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    label: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])

    def add(self, place: Place, where: np.ndarray, label: np.ndarray) -> None:
        """Entries `where` behind the first of a sequence."""
        self.index.append(place.start + 1 + where)
        self.label.append(label)

    def targets(self) -> Targets:
        """All of them, in order."""
        return Targets(*(torch.from_numpy(np.concatenate(pieces)) for pieces in (self.index, self.label)))


class Rows(MultiwayRows):
    """`(samples, plan) -> Batch` for training; `inputs`: each modality by itself. Picklable."""

    def view(self, modality: str) -> str:
        """Encoded by itself where there is a contrast, else embedded only."""
        return "encoder" if CONTRAST in self.config.asks else PARTS

    def parts(
        self, packer: Packer, sample: Sample, modalities: Sequence[str], rng: np.random.Generator | None = None
    ) -> tuple[dict[str, Part], np.ndarray, dict[str, Place]]:
        """In training what the stage shows."""
        shown = modalities if rng is None else [name for name in modalities if name in self.config.stage.data]
        return super().parts(packer, sample, shown, rng)

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens that the encoder reads before pairs are drawn."""
        asks, sizes = self.config.asks, self.sizes(lengths)
        sizes = {name: size for name, size in sizes.items() if name in self.config.stage.data}
        nothing = np.zeros_like(lengths.words)
        every, text = sum(sizes.values(), start=nothing), sizes.get("text", nothing)
        cost = every * (CONTRAST in asks) + sizes.get("image", nothing) * (PATCHES in asks)
        return np.maximum(cost + every * (text > 0) * (WORDS in asks), 1)

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """Contexts, and what is hidden."""
        hidden = {name: Hidden() for name in (WORDS, PATCHES) if name in self.config.asks}
        context = draw_contexts(rows)
        for row, used in zip(rows, context, strict=True):
            if WORDS in hidden and "text" in row.parts:
                beside = [name for name, one in zip(CONTEXTS, used, strict=True) if one]
                hidden[WORDS].add(*self._words(packer, row, beside))
            if PATCHES in hidden and "image" in row.parts:
                hidden[PATCHES].add(*self._patches(packer, row))
        targets = {name: each.targets() for name, each in hidden.items()}
        matched = sum("text" in row.parts and bool(used.any()) for row, used in zip(rows, context, strict=True))
        counts = {**{name: len(target.label) for name, target in targets.items()},
                  **({MATCH: matched} if MATCH in self.config.asks else {})}
        return Asked(targets, counts=counts, host={"context": context})

    def _words(self, packer: Packer, row: TowerRow, beside: list[str]) -> tuple[Place, np.ndarray, np.ndarray]:
        """The text with whole words hidden, beside its context: the sequence, where, and the words."""
        where = corrupt.whole_words(self.tokenizer.words_of(row.ids), self.config.token_rate, row.rng)
        shown = corrupt.words(row.ids[where], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
        text = packer.replace_text(row.parts["text"], 1 + where, shown)
        return self.join(packer, {"text": text, **{name: row.parts[name] for name in beside}}), where, row.ids[where]

    def _patches(self, packer: Packer, row: TowerRow) -> tuple[Place, np.ndarray, np.ndarray]:
        """The picture with blocks hidden: the sequence, where, and the codes. Nothing of a picture without codes."""
        codes = codes_of(row.sample, self.config.sight)
        where = corrupt.blocks(self.config.sight.grid, self.config.patch_rate, row.rng)
        place = self.join(packer, {"image": packer.hide_patches(row.parts["image"], where)})
        return (place, where, codes[where]) if codes is not None else (place, where[:0], where[:0])
