"""What each of OPT's tasks does to a row: which words, regions, frames or whole modalities it hides, or what it swaps.

    mlm, mvm, mam    token level on one modality, and the modality level over all three (paper Figure 1)
    dtr, dir         text or codes are written, looking at what is left of the sample
    match            pictures and recordings of other samples stand in: five-way labels
    joint            all of it on the same masked input: mixing `joint`

A sample without a modality draws among the tasks that it can do; one with a single modality has nothing to match.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opt.data import corrupt
from opt.data.pack import Packer, Part, Place
from opt.data.record import Sample
from opt.objectives.matching import ALL_MATCH, IMAGE_AUDIO, NONE_MATCH, TEXT_AUDIO, TEXT_IMAGE
from opt.systems.opt.collect import Clean, Collected
from opt.systems.system import MODALITIES

if TYPE_CHECKING:
    from opt.systems.opt.rows import Rows

TASKS = ("mlm", "mvm", "mam", "dtr", "dir", "match")
MASKED = {"mlm": "text", "mvm": "image", "mam": "audio"}
WRITTEN = {"dtr": "text", "dir": "image"}


class TaskRows:
    """One batch in the making: `clean` enters a sample, `row` adds the sequences and targets of its task."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.config, self.tokenizer = rows, rows.config, rows.tokenizer
        self.packer = Packer(rows.region_width, rows.speech_width)
        self.targets = Collected()

    def clean(self, sample: Sample, aligned: bool) -> Clean:
        """The sample's parts, and its single-modality sequences when it is `aligned`."""
        parts, ids = self.rows.parts(self.packer, sample)
        parts = {name: part for name, part in parts.items() if len(part)}  # a picture in which nothing was found
        alone = {name: self._sequence({name: part}) for name, part in parts.items()} if aligned else {}
        return Clean(sample, parts, alone, ids)

    def row(self, clean: Clean, task: str, partners: list[Clean], rng: np.random.Generator) -> None:
        """One row of the batch: the task drawn by the plan, or another when the sample lacks what it needs.

        A sample without any part stands as [CLS] alone, so that there is a sequence to encode on every rank.
        """
        if not clean.parts:
            self._sequence({})
            return
        if task == "joint":
            self._joint(clean, partners, rng)
            return
        possible = [name for name in TASKS if self._can(name, clean, partners)]
        task = task if task in possible else possible[rng.integers(len(possible))]
        if task == "match":
            self._match(clean, partners, rng)
        elif task in WRITTEN:
            self._write(clean, task, rng)
        else:
            self._hide(clean, MASKED[task], rng)

    def _can(self, task: str, clean: Clean, partners: list[Clean]) -> bool:
        if task in MASKED:
            return MASKED[task] in clean.parts
        if task in WRITTEN:
            return WRITTEN[task] in clean.writable and bool(clean.parts.keys() - {WRITTEN[task]})
        return len(partners) == 2 and len(clean.parts) > 1

    def _hide(self, clean: Clean, target: str, rng: np.random.Generator) -> None:
        """MLM, MVM, MAM: token level on the target, and the modality level over all three (Figure 1)."""
        hidden = self._hidden(clean, rng)
        parts, where = {}, np.zeros(0, np.int64)
        for name, part in clean.parts.items():
            if name == target:
                where = self._places(clean, name, rng, hidden[name])
                parts[name] = self._masked(clean, name, where, rng, hidden[name])
            elif not hidden[name]:
                parts[name] = part
            elif rng.random() >= self.config.drop_rate:
                parts[name] = self._masked(clean, name, np.arange(clean.length(name)), rng, whole=True)
        place = self._sequence(parts)
        self.targets.masked(clean, target, where, place.start + _offset(parts, target))

    def _write(self, clean: Clean, task: str, rng: np.random.Generator) -> None:
        """DTR, DIR: what stays is lightly masked. Which modalities stay is gap A2."""
        written = WRITTEN[task]
        if self.config.modality_masking == "paper":
            hidden = self._hidden(clean, rng)
        else:
            hidden = self._hidden_as_the_code(clean, written, rng)
        kept = [name for name in clean.parts if not hidden[name]]
        dropped = [name for name in clean.parts if hidden[name] and rng.random() < self.config.drop_rate]
        if len(kept) == 1 and kept[0] in clean.alone and len(dropped) == len(clean.parts) - 1:
            place = clean.alone[kept[0]]  # the same sequence, unmasked, is there already
        else:
            parts = {name: self._masked(clean, name, self._places(clean, name, rng, hidden[name]), rng, hidden[name])
                     for name in clean.parts if name not in dropped}
            place = self._sequence(parts)
        self._writing(clean, written, place)

    def _writing(self, clean: Clean, written: str, place: Place) -> None:
        """The caption, or the picture's codes, as targets of a decoder that looks at `place`."""
        if written == "text":
            self.packer.write("text", np.concatenate([[self.tokenizer.bos], clean.ids]),
                              np.concatenate([clean.ids, [self.tokenizer.eos]]), place)
            return
        codes = clean.sample.pictures[0].codes
        assert codes is not None
        labels = codes.ravel().astype(np.int64)
        self.packer.write("codes", np.concatenate([[self.rows.codebook], labels[:-1]]), labels, place)

    def _match(self, clean: Clean, partners: list[Clean], rng: np.random.Generator) -> None:
        """Five-way matching on whole inputs."""
        names = list(clean.parts)
        if len(names) == 3 and rng.random() < self.config.pair_rate:
            names.pop(rng.integers(3))
        sources, label = _swapped(clean, names, partners, rng)
        place = self._sequence({name: source.parts[name] for name, source in sources.items()})
        self.targets.match(place, label)

    def _joint(self, clean: Clean, partners: list[Clean], rng: np.random.Generator) -> None:
        """Token and modality level stacked on one input that all losses look at; swapped, it is matched (Figure 1)."""
        hidden = self._hidden(clean, rng)
        parts, where = {}, {}
        for name in clean.parts:
            if not hidden[name] or rng.random() >= self.config.drop_rate:
                where[name] = self._places(clean, name, rng, hidden[name])
                parts[name] = self._masked(clean, name, where[name], rng, hidden[name])
        place = self._sequence(parts)
        for name in parts:
            self.targets.masked(clean, name, where[name], place.start + _offset(parts, name))
        for written in clean.writable:
            self._writing(clean, written, place)
        seen = [name for name in parts if not hidden[name]]
        if len(partners) < 2 or len(seen) < 2:
            return
        sources, label = _swapped(clean, seen, partners, rng)
        for name in (name for name, source in sources.items() if source is not clean):
            source = sources[name]
            parts[name] = self._masked(source, name, self._places(source, name, rng), rng)
        self.targets.match(place if label == ALL_MATCH else self._sequence(parts), label)

    def _hidden(self, clean: Clean, rng: np.random.Generator) -> dict[str, bool]:
        """Each modality hidden independently, never all that are there."""
        present = np.array([name in clean.parts for name in MODALITIES])
        hidden = corrupt.modalities(present, self.config.modality_rate, rng)
        return dict(zip(MODALITIES, hidden.tolist(), strict=True))

    def _hidden_as_the_code(self, clean: Clean, written: str, rng: np.random.Generator) -> dict[str, bool]:
        """What is written is hidden; of two others the first, the second or none."""
        hidden = dict.fromkeys(MODALITIES, False)
        hidden[written] = written in clean.parts
        sources = [name for name in clean.parts if name != written]
        draw = rng.random()
        if len(sources) == 2 and draw < 2 * self.config.modality_rate:
            hidden[sources[int(draw >= self.config.modality_rate)]] = True
        return hidden

    def _places(self, clean: Clean, name: str, rng: np.random.Generator, whole: bool = False) -> np.ndarray:
        """Which of the modality's tokens are hidden."""
        length = clean.length(name)
        if whole:
            return np.arange(length)
        return corrupt.positions(length, self.config.token_rate, rng, self.config.frame_span if name == "audio" else 1)

    def _masked(self, clean: Clean, name: str, where: np.ndarray, rng: np.random.Generator,
                whole: bool = False) -> Part:
        """A part with the entries at `where` hidden; text at token level by 80/10/10, whole text by [MASK] alone."""
        part = clean.parts[name]
        if name == "text":
            ids = np.full(len(where), self.tokenizer.mask) if whole else corrupt.words(
                clean.ids[where], self.tokenizer.mask, self.tokenizer.ordinary, rng)
            return self.packer.replace_text(part, where + 1, ids)
        if name == "image":
            boxes = clean.sample.pictures[0].boxes
            assert boxes is not None
            return self.packer.hide_regions(part, where, boxes)
        return self.packer.hide_frames(part, where)

    def _sequence(self, parts: dict[str, Part]) -> Place:
        return self.packer.sequence("encoder", self.rows.join(self.packer, parts))


def _swapped(clean: Clean, names: list[str], partners: list[Clean], rng: np.random.Generator
             ) -> tuple[dict[str, Clean], int]:
    """Whose parts stand where, and the label, uniform over the classes there are: five for three modalities, two for
    two. Text is the anchor (section 2.3 of the official code); a partner that lacks a part leaves the row matching."""
    first, second = partners
    labels = range(5) if len(names) == 3 else (ALL_MATCH, NONE_MATCH)
    label = labels[rng.integers(len(labels))]
    sources = {name: clean for name in names}
    if label in (IMAGE_AUDIO, TEXT_AUDIO, NONE_MATCH) and "image" in sources:
        sources["image"] = first
    if label in (IMAGE_AUDIO, TEXT_IMAGE, NONE_MATCH) and "audio" in sources:
        sources["audio"] = second if label == NONE_MATCH else first
    if any(name not in source.parts for name, source in sources.items()):
        return {name: clean for name in names}, ALL_MATCH
    return sources, label


def _offset(parts: dict[str, Part], target: str) -> int:
    """Where the target's first hideable token lies in its sequence (behind [CLS] and the parts before)."""
    before = MODALITIES[: MODALITIES.index(target)]
    return sum(len(parts[name]) for name in before if name in parts) + int(target == "text" or "text" not in parts)
