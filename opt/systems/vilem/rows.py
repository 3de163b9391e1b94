"""What ViLEM asks of the rows of a batch: texts to be edited, and where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opt.data.batch import Targets
from opt.data.pack import TEXT, Packer
from opt.data.record import Lengths
from opt.data.tokenizer import Tokenizer
from opt.systems.shared.matching import CONTEXTS
from opt.systems.shared.rows import Asked, TowerRow, TowerRows
from opt.systems.vilem.config import ViLEMConfig


class Rows(TowerRows):
    """Texts of usable rows come once more to be edited, and once for each edit (or once) with masks, for the editor.

    view "edited"       those texts, as they are until the editor has spoken
    view "masked"       what the editor reads; targets "edit": its masks, and the words that stood there
    extra "edit_entry"  the entry of the text table that each of these words is (M,)
    extra "edit_place"  its place in the view "edited" (M,); extra "edit_key": its own random number (M,)
    counts "edit"       edited words
    host "context"      by which of picture and speech each row's text is judged, bool (B, 2)

    editable: tokens that may be changed, bool (V,).
    """

    config: ViLEMConfig

    def __init__(self, config: ViLEMConfig, tokenizer: Tokenizer, speech_width: int, modalities: Sequence[str],
                 editable: np.ndarray) -> None:
        super().__init__(config, tokenizer, speech_width, modalities)
        self.editable = editable

    def packer(self) -> Packer:
        """An empty one with the editor's views beside those of the towers."""
        packer = super().packer()
        packer.views |= {"edited": (TEXT,), "masked": (TEXT,)}
        return packer

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality's own sequence, of the text that is edited, and about as many as the editor reads."""
        sizes = self.sizes(lengths)
        usable = (sum(sizes.get(name, 0) for name in CONTEXTS) > 0) & (self.config.edits != "none")
        places = np.minimum(self.config.token_rate * np.maximum(sizes["text"] - 2, 0), self.config.most_edits)
        masked = places if self.config.edits == "one" else np.minimum(places, 1)
        read = np.round(sizes["text"] * (1 + masked)).astype(np.int64)
        return np.maximum(sum(sizes.values()) + read * usable, 1)

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """Contexts, and the places of the words that the editor is to change."""
        context = self._contexts(rows)
        used = [row for row, drawn in zip(rows, context, strict=True) if drawn.any() and "text" in row.alone]
        none = np.zeros(0, np.int64)
        index, label, entry, place, key = [none], [none], [none], [none], [none]
        for row in used if self.config.edits != "none" else ():
            part, chosen = row.parts["text"], self._chosen(row)
            edited = packer.sequence("edited", [part])
            for group in chosen[:, None] if self.config.edits == "one" else [chosen] * (len(chosen) > 0):
                mask = np.full(len(group), self.tokenizer.mask)
                masked = packer.sequence("masked", [packer.replace_text(part, 1 + group, mask)])
                index.append(masked.start + 1 + group)
            label.append(row.ids[chosen])
            entry.append(part.entries[1 + chosen])
            place.append(edited.start + 1 + chosen)
            key.append(row.rng.integers(2**63, size=len(chosen)))
        extra = {"edit_entry": entry, "edit_place": place, "edit_key": key}
        return Asked(
            {"edit": Targets(_joined(index), _joined(label))}, {name: _joined(each) for name, each in extra.items()},
            {"edit": sum(map(len, label))}, {"context": context},
        )

    def _contexts(self, rows: Sequence[TowerRow]) -> np.ndarray:
        """What the row has; of both the picture or the speech, equally often: bool (B, 2)."""
        has = np.array([[name in row.alone for name in CONTEXTS] for row in rows], bool).reshape(-1, 2)
        drawn = np.eye(2, dtype=bool)[[int(row.rng.integers(2)) for row in rows]].reshape(-1, 2)
        return np.asarray(np.where(has.all(axis=1, keepdims=True), drawn, has))

    def _chosen(self, row: TowerRow) -> np.ndarray:
        """Places of the words to change, in order; there may be none."""
        chosen = np.flatnonzero((row.rng.random(len(row.ids)) < self.config.token_rate) & self.editable[row.ids])
        if len(chosen) > self.config.most_edits:
            chosen = np.sort(row.rng.choice(chosen, self.config.most_edits, replace=False))
        return chosen


def _joined(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces))
