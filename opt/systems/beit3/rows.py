"""BEiT-3's preparer: each sample is masked by its modalities alone and together, all in one packed encoder run.

    [class] patches                                     40 % hidden, in blocks
    [CLS] words [SEP]                                   15 % hidden
    [class] frames                                      50 % hidden, in runs
    [class] patches  [CLS] words [SEP]  [class] frames  two modalities, or three: words at 50 %
    each modality whole, by itself                      where the stage asks for the contrast (shared/pairs.py)

    targets, counts "text", "image", "audio"    what is hidden in a modality by itself: words, image codes, speech codes
                                                or places in the table of frames
    targets, counts "fused_text", ...           the same beside others
    targets, counts "caption"                   hidden words and ends, where the model is tuned for captions

A picture without codes is shown whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import Packer, Part
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.systems.beit3.config import BEiT3Config
from opt.systems.shared.codes import codes_of
from opt.systems.shared.multiway import TABLE, MultiwayRows
from opt.systems.shared.pairs import alignment_pairs
from opt.systems.shared.rows import TowerRow

TOGETHER = (("image", "text"), ("text", "audio"), ("image", "audio"), ("image", "text", "audio"))
"""What is masked side by side, one of these for each row."""
SOURCES = ("image", "audio")
"""What captions are written from, in the order in which it stands before them."""
FUSED = "fused_"
"""Targets of sequences of several modalities begin so."""

Found = dict[str, list[tuple[np.ndarray, np.ndarray]]]
"""By name of the target, hidden tokens and what they are."""


class Rows(MultiwayRows):
    """`(samples, plan) -> Batch` for training; `inputs`: each modality by itself. Picklable.

    speech_codes: whether hidden frames are told by codes, or by their places in the table.
    """

    def __init__(self, config: BEiT3Config, tokenizer: Tokenizer, speech_width: int, modalities: Sequence[str],
                 speech_codes: bool) -> None:
        super().__init__(config, tokenizer, speech_width, modalities)
        self.speech_codes = speech_codes

    @property
    def shown(self) -> tuple[str, ...]:
        """Modalities that the stage shows."""
        return tuple(name for name in self.modalities if name in self.config.stage.data)

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality by itself, hidden and whole, and of all of them side by side."""
        sizes = {name: size for name, size in self.sizes(lengths).items() if name in self.shown}
        alone, several = sum(sizes.values()), sum(size > 0 for size in sizes.values()) > 1
        masked = (1 + several) * ("masked" in self.config.asks)
        return np.maximum((masked + ("contrast" in self.config.asks)) * alone, 1)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch; a sample that shows nothing stands as [CLS], so that there is something to encode."""
        packer, rows = self.packer(), []
        found: Found = defaultdict(list)
        for number, key in zip(plan.sample.tolist(), plan.key, strict=True):
            row = self._row(packer, samples[number], corrupt.row_generator(int(key)))
            if "contrast" in self.config.asks:
                row.alone.update({name: self.lone(packer, name, part) for name, part in row.parts.items()})
            if "masked" in self.config.asks:
                self._hide_all(packer, row, found)
            if not row.parts:
                packer.sequence("encoder", [packer.text(np.array([self.tokenizer.cls]))])
            rows.append(row)
        names = [FUSED * fused + name for name in self.modalities for fused in range(2)]
        pairs, targets = alignment_pairs(rows), {name: _joined(found[name]) for name in names}
        counts = {name: len(each) for name, each in pairs.items()}
        counts |= {name: len(target.index) for name, target in targets.items()}
        return packer.batch([row.sample.key for row in rows], targets, pairs, counts)

    def _row(self, packer: Packer, sample: Sample, rng: np.random.Generator) -> TowerRow:
        """What is shown of a sample, of several pictures the first; no sequences yet."""
        tables, ids = self.tables(packer, sample, self.shown, rng, pictures=1)
        return TowerRow(sample, ids, {name: part for name, (part,) in tables.items()}, {}, rng)

    def _hide_all(self, packer: Packer, row: TowerRow, found: Found) -> None:
        """Each modality by itself, then some of them together."""
        for name in row.parts:
            self._hide(packer, row, (name,), found)
        if possible := [names for names in TOGETHER if all(name in row.parts for name in names)]:
            self._hide(packer, row, possible[row.rng.integers(len(possible))], found)

    def _hide(self, packer: Packer, row: TowerRow, names: tuple[str, ...], found: Found) -> None:
        """One sequence of these modalities, in the order of the configuration, something hidden in each."""
        hide = {"text": self._hidden_text, "image": self._hidden_image, "audio": self._hidden_audio}
        parts, told, fused = {}, {}, len(names) > 1
        for name in names:
            parts[name], *told[name] = hide[name](packer, row, fused)
        start = self.join(packer, parts).start
        for name in (name for name in self.config.reads if name in parts):
            where, label = told[name]
            if len(where):
                found[FUSED * fused + name].append((start + 1 + where, label))
            start += len(parts[name]) + (name != "text")

    def _hidden_text(self, packer: Packer, row: TowerRow, fused: bool) -> tuple[Part, np.ndarray, np.ndarray]:
        """Words, and their ids."""
        rate = self.config.fused_text_rate if fused else self.config.text_rate
        where = corrupt.positions(len(row.ids), rate, row.rng)
        shown = corrupt.words(row.ids[where], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
        return packer.replace_text(row.parts["text"], 1 + where, shown), where, row.ids[where]

    def _hidden_image(self, packer: Packer, row: TowerRow, fused: bool) -> tuple[Part, np.ndarray, np.ndarray]:
        """Patches, and their codes."""
        codes = codes_of(row.sample, self.config.sight)
        if codes is None:
            return row.parts["image"], np.zeros(0, np.int64), np.zeros(0, np.int64)
        where = corrupt.blocks(self.config.sight.grid, self.config.image_rate, row.rng)
        return packer.hide_patches(row.parts["image"], where), where, codes[where]

    def _hidden_audio(self, packer: Packer, row: TowerRow, fused: bool) -> tuple[Part, np.ndarray, np.ndarray]:
        """Frames, and their codes (m, G), or their places in the table (m,)."""
        part = row.parts["audio"]
        codes = row.sample.speech_codes if self.speech_codes else part.entries
        if codes is None:
            return part, np.zeros(0, np.int64), np.zeros(0, np.int64)
        where = corrupt.positions(len(part), self.config.speech_rate, row.rng, self.config.frame_span)
        return packer.hide_frames(part, where), where, codes[where].astype(np.int64)


class CaptionRows(Rows):
    """The preparer of a model that is tuned for captions: pictures, speech or both whole, and behind them a caption
    with hidden words, whose last is the end. Picklable."""

    tasks = Tasks(("captioning",), (1.0,))

    @property
    def shown(self) -> tuple[str, ...]:
        """The caption and what it is written from."""
        return ("text", *(name for name in SOURCES if name in self.config.tuning.given))

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of a caption and of what it is written from."""
        sizes = self.sizes(lengths)
        return np.maximum(sum(sizes[name] for name in self.shown), 1)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch of samples that have a caption and what it is written from."""
        packer, found = self.packer(), list[tuple[np.ndarray, np.ndarray]]()
        for number, key in zip(plan.sample.tolist(), plan.key, strict=True):
            row = self._row(packer, samples[number], corrupt.row_generator(int(key)))
            words = np.append(row.ids, self.tokenizer.sep)
            where = corrupt.positions(len(words), self.config.caption_rate, row.rng)
            shown = corrupt.words(words[where], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
            given = [each for name in self.shown[1:] for each in (packer.first(TABLE[name]), row.parts[name])]
            place = packer.sequence("encoder", [*given, packer.replace_text(row.parts["text"], 1 + where, shown)])
            found.append((place.start + place.length - len(words) + where, words[where]))
        target, keys = _joined(found), [samples[number].key for number in plan.sample.tolist()]
        return packer.batch(keys, {"caption": target}, {}, {"caption": len(target.index)})


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> Targets:
    """Tokens, and what they are, of all pieces."""
    index, label = ([piece[side] for piece in pieces] or [np.zeros(0, np.int64)] for side in range(2))
    return Targets(torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(label)))
