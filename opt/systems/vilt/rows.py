"""ViLT's preparer: each sample becomes a row with hidden words and a row to match, all in one packed encoder run.

    [CLS] words [SEP]  frames  [class] patches     a sequence of the view "encoder"; what is absent is left out

    targets "mlm"      hidden words, all pieces of a word together
    targets "match"    [CLS] of rows: 1 where all parts belong together, 0 where one is another sample's
    extra "words", "patches"  (S, T), (S, P)   tokens of the rows to match that have both, PADDING behind them
    extra "near" (S,) bool                     whether that picture is the text's own

With a contrast, each part stands alone too: [CLS] words [SEP], [class] patches, [CLS] frames (shared/pairs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import FRAME, PATCH, TEXT, Packer, Part, Place
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.systems.shared.pairs import alignment_pairs
from opt.systems.shared.rows import TowerRow, TowerRows

PADDING = -1
MATCHED = (("text", "image"), ("text", "audio"), ("audio", "image"), ("text", "audio", "image"))
"""What rows to match are made of: whatever can be scored."""
READ_BESIDE = (("image",), ("audio",), ("audio", "image"))
"""What hidden words are read off, beside the words that are left."""


@dataclass
class Asked:
    """Targets of a batch, in the order they are added."""

    hidden: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Flat tokens, and the words' ids."""
    match: list[tuple[int, bool]] = field(default_factory=list)
    """First tokens, and whether the parts belong together."""
    aligned: list[tuple[np.ndarray, np.ndarray, bool]] = field(default_factory=list)
    """Flat tokens of words and of patches, and whether they belong together."""

    def targets(self) -> dict[str, Targets]:
        """Index and label of hidden words and of rows to match."""
        index, label = (np.concatenate([np.zeros(0, np.int64), *(pair[side] for pair in self.hidden)])
                        for side in range(2))
        match = torch.tensor(self.match, dtype=torch.int64).reshape(-1, 2)
        return {"mlm": Targets(torch.from_numpy(index), torch.from_numpy(label)),
                "match": Targets(match[:, 0], match[:, 1])}

    def extra(self) -> dict[str, Tensor]:
        """Rows whose words and patches are aligned."""
        return {
            "words": _padded([words for words, _, _ in self.aligned]),
            "patches": _padded([patches for _, patches, _ in self.aligned]),
            "near": torch.tensor([near for _, _, near in self.aligned], dtype=torch.bool),
        }


class Rows(TowerRows):
    """`(samples, plan) -> Batch` for training; `inputs`: each modality by itself. Picklable."""

    tasks = Tasks(("pair",), (1.0,), ("pair",))

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of both rows with all that the sample has, and of each part alone where there is a contrast."""
        sizes = self.sizes(lengths)
        if self.config.most_patches:
            sizes["image"] = np.minimum(sizes["image"], self.config.most_patches + 1)
        alone = sum(sizes.values())
        return np.maximum((3 if self.config.contrast_weight > 0 else 2) * alone, 1)

    def packer(self) -> Packer:
        """An empty one with the view "encoder" over words, frames and patches."""
        views = {"encoder": (TEXT, FRAME, PATCH) if self.config.hears else (TEXT, PATCH)}
        return Packer(1, max(self.speech_width, 1), 3 * self.config.sight.patch**2, (PATCH,), views)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch. Partners may be rows of another rank: whatever is drawn, is drawn by the row's own key."""
        packer, asked, rows = self.packer(), Asked(), []
        partners = plan.partners[plan.partners >= 0].tolist()
        known = {number: self._clean(packer, samples[number])
                 for number in dict.fromkeys([*plan.sample.tolist(), *sorted(partners)])}
        for number, key, others in zip(plan.sample.tolist(), plan.key, plan.partners.tolist(), strict=True):
            row = TowerRow(samples[number], *known[number], {}, corrupt.row_generator(int(key)))
            self._ask(packer, row, [known[other][1] for other in others if other >= 0], asked)
            rows.append(row)
        targets, extra = asked.targets(), asked.extra()
        counts = {**{name: len(target.index) for name, target in targets.items()}, "wpa": len(asked.aligned)}
        if self.config.contrast_weight > 0:
            pairs = alignment_pairs(rows)
            extra.update(pairs)
            counts.update({name: len(pair) for name, pair in pairs.items()})
        return packer.batch([row.sample.key for row in rows], targets, extra, counts)

    def _ask(self, packer: Packer, row: TowerRow, partners: list[dict[str, Part]], asked: Asked) -> None:
        """All sequences of a row. A sample that gives none stands as [CLS], so that there is something to encode."""
        if self.config.contrast_weight > 0:
            row.alone.update({name: self.join(packer, {name: part}, row.rng) for name, part in row.parts.items()})
        if "text" in row.parts:
            self._hide(packer, row, asked)
        if len(row.parts) > 1:
            self._match(packer, row, partners, asked)
        elif "text" not in row.parts and not row.alone:
            self.join(packer, {})

    def _clean(self, packer: Packer, sample: Sample) -> tuple[np.ndarray, dict[str, Part]]:
        """A sample in training: its words' ids and its parts, of several pictures the first."""
        tables, ids = self.tables(packer, sample, self.modalities, pictures=1)
        return ids, {name: part for name, (part,) in tables.items()}

    def _hide(self, packer: Packer, row: TowerRow, asked: Asked) -> None:
        """Whole words hidden, beside what is drawn of the rest."""
        beside = _drawn(READ_BESIDE, row)
        where = corrupt.whole_words(self.tokenizer.words_of(row.ids), self.config.token_rate, row.rng)
        ids = corrupt.words(row.ids[where], self.tokenizer.mask, self.tokenizer.ordinary, row.rng)
        text = packer.replace_text(row.parts["text"], where + 1, ids)
        place = self.join(packer, {"text": text, **{name: row.parts[name] for name in beside}}, row.rng)
        asked.hidden.append((place.start + 1 + where, row.ids[where]))

    def _match(self, packer: Packer, row: TowerRow, partners: list[dict[str, Part]], asked: Asked) -> None:
        """Half of the rows keep what belongs together; in the others a partner's picture or recording stands in, where
        one has it."""
        names = _drawn(MATCHED, row)
        parts = {name: row.parts[name] for name in names}
        swaps = [(name, other[name]) for name in names if name != "text" for other in partners if name in other]
        swapped = None
        if row.rng.random() < 0.5 and swaps:
            swapped, parts[swapped] = swaps[row.rng.integers(len(swaps))]
        place = self.join(packer, parts, row.rng)
        asked.match.append((place.start, swapped is None))
        if "text" in parts and "image" in parts:
            end = place.start + place.length
            patches = np.arange(end - self.visible(len(parts["image"])), end)
            asked.aligned.append((place.start + 1 + np.arange(len(row.ids)), patches, swapped != "image"))

    def join(self, packer: Packer, parts: Mapping[str, Part], rng: np.random.Generator | None = None) -> Place:
        """One sequence; [CLS] alone before a recording without text. rng: draws the patches that training sees."""
        ordered = [] if "text" in parts or list(parts) == ["image"] else [packer.text(np.array([self.tokenizer.cls]))]
        for name in self.config.reads:
            if name == "image" and name in parts:
                ordered += [packer.first(PATCH), self._seen(parts[name], rng)]
            elif name in parts:
                ordered.append(parts[name])
        return packer.sequence("encoder", ordered)

    def visible(self, patches: int) -> int:
        """How many patches of a picture training sees."""
        return min(patches, self.config.most_patches) if self.config.most_patches else patches

    def _seen(self, part: Part, rng: np.random.Generator | None) -> Part:
        if rng is None or self.visible(len(part)) == len(part):
            return part
        chosen = rng.choice(len(part), self.visible(len(part)), replace=False)
        return Part(part.table, part.entries[np.sort(chosen)])

    def lone(self, packer: Packer, modality: str, part: Part) -> Place:
        """One part by itself."""
        return self.join(packer, {modality: part})


def _drawn(options: Sequence[tuple[str, ...]], row: TowerRow) -> tuple[str, ...]:
    """One of the options whose parts the row has; none where it has none."""
    possible = [names for names in options if all(name in row.parts for name in names)]
    return possible[row.rng.integers(len(possible))] if possible else ()


def _padded(pieces: Sequence[np.ndarray]) -> Tensor:
    """(S, longest) int64, PADDING behind each piece."""
    longest = max(map(len, pieces), default=0)
    padded = np.full((len(pieces), longest), PADDING, np.int64)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = piece
    return torch.from_numpy(padded)
