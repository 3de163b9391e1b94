"""BLIP's preparer: captions as they are read, and as they are written."""

from __future__ import annotations

import numpy as np
import torch

from opt.data.batch import Targets
from opt.data.pack import FRAME, PATCH, TEXT, Packer
from opt.data.record import Lengths
from opt.systems.shared.matching import CONTEXTS, draw_contexts
from opt.systems.shared.rows import VIEWS, Asked, TowerRow, TowerRows

WRITING, LANGUAGE = "writing", "language"
"""The view of what is written ([DEC], the prompt, words), and its targets."""


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
