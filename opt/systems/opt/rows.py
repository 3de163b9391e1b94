"""OPT's preparer: every row draws one task, hides or swaps what that task asks for, and joins one packed encoder run.

    view "encoder"      one run for everything: corrupted rows first, then each sample's text, picture and speech alone
    targets             "mlm", "regions", "frames": hidden tokens of that view; "match": rows with a five-way label
    writings            "text" (DTR) and "codes" (DIR): decoder targets beside the sequence they look at
    extra               region classes, recordings of frames, and the pairs of the alignment

Corruption at the three levels of the paper (docs/opt.md): token, modality, sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opt.config import UserError
from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import Packer, Part, Place
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.objectives.matching import ALL_MATCH, IMAGE_AUDIO, NONE_MATCH, TEXT_AUDIO, TEXT_IMAGE
from opt.systems.opt.config import OPTConfig

TASKS = ("mlm", "mvm", "mam", "dtr", "dir", "match")
MODALITIES = ("text", "image", "audio")
PAIRS = (("text", "image"), ("text", "audio"), ("image", "audio"))


@dataclass(frozen=True)
class Clean:
    """One sample's uncorrupted parts in the tables, and what of it targets need."""

    sample: Sample
    parts: dict[str, Part]
    alone: dict[str, Place]
    """Single-modality sequences, present when the batch holds them for the alignment."""
    ids: np.ndarray


class Rows:
    """The preparer of OPT: `(samples, plan) -> Batch` for training, `inputs` for everything else. Picklable."""

    jpeg = False

    def __init__(self, config: OPTConfig, tokenizer: Tokenizer, region_width: int, speech_width: int, codebook: int):
        self.config, self.tokenizer, self.codebook = config, tokenizer, codebook
        self.region_width, self.speech_width = region_width, speech_width
        shares = config.shares
        self.tasks = Tasks(TASKS, tuple(float(getattr(shares, task)) for task in TASKS), ("match",))

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Encoder tokens a sample becomes: its fused row, and each modality alone when alignment is on."""
        text = np.minimum(lengths.words + 2, self.config.text_positions) * (lengths.words > 0)
        frames = np.minimum(lengths.frames, self.config.frame_positions)
        fused = text + lengths.regions + frames + 1
        return fused + (fused + 2 if self.config.alignment_weight > 0 else 0)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch of corrupted rows."""
        work = _BatchWork(self)
        cleans = {index: work.clean(samples[index]) for index in dict.fromkeys(map(int, plan.sample))}
        for row, index in enumerate(map(int, plan.sample)):
            partners = [cleans.get(int(p)) or work.clean(samples[int(p)]) for p in plan.partners[row] if p >= 0]
            work.row(cleans[index], TASKS[plan.task[row]], partners, corrupt.row_generator(int(plan.key[row])))
        rows = [cleans[int(index)] for index in plan.sample]
        return work.batch(rows)

    def inputs(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Batch:
        """Uncorrupted sequences of the named modalities, one a sample. Raises UserError when one is absent.

        A picture in which the detector found nothing is there, as [CLS] alone.
        """
        packer = Packer(self.region_width, self.speech_width)
        for sample in samples:
            parts, _ = self.parts(packer, sample, modalities)
            if missing := [modality for modality in modalities if modality not in parts]:
                raise UserError(f"sample {sample.key!r} has no {missing[0]}; choose modalities that the shards hold")
            packer.sequence("encoder", self.join(packer, {name: parts[name] for name in modalities}))
        return packer.batch([sample.key for sample in samples], {}, {}, {})

    def parts(
        self, packer: Packer, sample: Sample, modalities: Sequence[str] = MODALITIES
    ) -> tuple[dict[str, Part], np.ndarray]:
        """The sample's parts in the tables by modality, absent ones left out, and its words' ids."""
        parts: dict[str, Part] = {}
        ids = np.zeros(0, np.int64)
        if sample.caption and "text" in modalities:
            ids = self.tokenizer.encode(sample.caption, self.config.text_positions - 2)
            parts["text"] = packer.text(np.concatenate([[self.tokenizer.cls], ids, [self.tokenizer.sep]]))
        picture = sample.pictures[0] if sample.pictures and "image" in modalities else None
        if picture is not None and picture.regions is not None:
            parts["image"] = packer.regions(picture)
        if sample.speech is not None and "audio" in modalities:
            parts["audio"] = packer.frames(sample.speech[: self.config.frame_positions])
        return parts, ids

    def join(self, packer: Packer, parts: dict[str, Part]) -> list[Part]:
        """One sequence: [CLS] words [SEP], regions, frames; [CLS] alone before a sequence without text."""
        ordered = [parts[name] for name in MODALITIES if name in parts]
        return ordered if "text" in parts else [packer.text(np.array([self.tokenizer.cls])), *ordered]


class _BatchWork:
    """One batch in the making."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.config, self.tokenizer = rows, rows.config, rows.tokenizer
        self.packer = Packer(rows.region_width, rows.speech_width)
        self.index: dict[str, list[np.ndarray]] = {name: [] for name in ("mlm", "regions", "frames", "match")}
        self.label: dict[str, list[np.ndarray]] = {name: [] for name in self.index}
        self.classes: list[np.ndarray] = []
        self.contrast: list[np.ndarray] = []
        self.contrast_own: list[np.ndarray] = []
        self.contrast_size = 0

    def clean(self, sample: Sample) -> Clean:
        """The sample's parts, and its single-modality sequences when the alignment needs them."""
        parts, ids = self.rows.parts(self.packer, sample)
        parts = {name: part for name, part in parts.items() if len(part)}  # a picture in which nothing was found
        alone = {}
        if self.config.alignment_weight > 0:
            alone = {name: self.packer.sequence("encoder", self.rows.join(self.packer, {name: part}))
                     for name, part in parts.items()}
        return Clean(sample, parts, alone, ids)

    def row(self, clean: Clean, task: str, partners: list[Clean], rng: np.random.Generator) -> None:
        """One row of the batch: the task drawn by the plan, or another when the sample lacks what it needs."""
        possible = [name for name in TASKS if self._can(name, clean, partners)]
        if not possible:
            return
        task = task if task in possible else possible[rng.integers(len(possible))]
        if task == "match":
            self._match(clean, partners, rng)
        elif task in ("dtr", "dir"):
            self._write(clean, task, rng)
        else:
            self._hide(clean, {"mlm": "text", "mvm": "image", "mam": "audio"}[task], rng)

    def _can(self, task: str, clean: Clean, partners: list[Clean]) -> bool:
        needs = {"mlm": "text", "mvm": "image", "mam": "audio"}
        if task in needs:
            return needs[task] in clean.parts and (task != "mlm" or len(clean.ids) > 0)
        if task == "dtr":
            return len(clean.ids) > 0 and len(clean.parts) > 1
        if task == "dir":
            return bool(clean.sample.pictures) and clean.sample.pictures[0].codes is not None \
                and bool(clean.parts.keys() - {"image"})
        return len(partners) == 2 and len(clean.parts) > 1

    def _hide(self, clean: Clean, target: str, rng: np.random.Generator) -> None:
        """MLM, MVM, MAM: token level on the target, and the modality level over all three (Figure 1)."""
        present = np.array([name in clean.parts for name in MODALITIES])
        hidden = dict(zip(MODALITIES, corrupt.modalities(present, self.config.modality_rate, rng), strict=True))
        parts, where = {}, np.zeros(0, np.int64)
        for name, part in clean.parts.items():
            length = self._length(clean, name)
            if name == target:
                whole = hidden[name]
                where = np.arange(length) if whole else corrupt.positions(length, self.config.token_rate, rng)
                parts[name] = self._masked(clean, name, where, rng, whole)
            elif not hidden[name]:
                parts[name] = part
            elif rng.random() >= self.config.drop_rate:
                parts[name] = self._masked(clean, name, np.arange(length), rng, whole=True)
        place = self.packer.sequence("encoder", self.rows.join(self.packer, parts))
        self._add_targets(clean, target, where, place.start + self._offset(parts, target))

    def _write(self, clean: Clean, task: str, rng: np.random.Generator) -> None:
        """DTR, DIR: the written modality is absent; of the others one is hidden whole, or all are lightly masked."""
        written = "text" if task == "dtr" else "image"
        sources = [name for name in clean.parts if name != written]
        draw = rng.random()
        kept = sources
        if len(sources) == 2 and draw < 2 * self.config.modality_rate:
            kept = [sources[int(draw < self.config.modality_rate)]]
        if len(kept) == 1 and kept[0] in clean.alone:
            place = clean.alone[kept[0]]
        else:
            parts = {name: self._masked(clean, name, corrupt.positions(
                self._length(clean, name), self.config.token_rate, rng), rng) for name in kept}
            place = self.packer.sequence("encoder", self.rows.join(self.packer, parts))
        if task == "dtr":
            self.packer.write("text", np.concatenate([[self.tokenizer.bos], clean.ids]),
                              np.concatenate([clean.ids, [self.tokenizer.eos]]), place)
        else:
            codes = clean.sample.pictures[0].codes
            assert codes is not None
            labels = codes.ravel().astype(np.int64)
            self.packer.write("codes", np.concatenate([[self.rows.codebook], labels[:-1]]), labels, place)

    def _match(self, clean: Clean, partners: list[Clean], rng: np.random.Generator) -> None:
        """Five-way matching: text is the anchor; pictures and recordings come from other samples (section 2.3)."""
        names = [name for name in MODALITIES if name in clean.parts]
        if len(names) == 3 and rng.random() < self.config.pair_rate:
            names.pop(rng.integers(3))
        first, second = partners
        labels = range(5) if len(names) == 3 else (ALL_MATCH, NONE_MATCH)
        label = labels[rng.integers(len(labels))]
        sources = {name: clean for name in names}
        if label in (IMAGE_AUDIO, TEXT_AUDIO, NONE_MATCH) and "image" in sources:
            sources["image"] = first
        if label in (IMAGE_AUDIO, TEXT_IMAGE, NONE_MATCH) and "audio" in sources:
            sources["audio"] = second if label == NONE_MATCH else first
        if any(name not in source.parts for name, source in sources.items()):
            sources, label = {name: clean for name in names}, ALL_MATCH
        parts = {name: source.parts[name] for name, source in sources.items()}
        place = self.packer.sequence("encoder", self.rows.join(self.packer, parts))
        self.index["match"].append(np.array([place.start]))
        self.label["match"].append(np.array([label]))

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

    def _length(self, clean: Clean, name: str) -> int:
        return len(clean.ids) if name == "text" else len(clean.parts[name])

    def _offset(self, parts: dict[str, Part], target: str) -> int:
        """Where the target's first hideable token lies in its sequence (behind [CLS] and the parts before)."""
        before = MODALITIES[: MODALITIES.index(target)]
        return sum(len(parts[name]) for name in before if name in parts) + int(target == "text" or "text" not in parts)

    def _add_targets(self, clean: Clean, target: str, where: np.ndarray, start: int) -> None:
        name = {"text": "mlm", "image": "regions", "audio": "frames"}[target]
        self.index[name].append(start + where)
        if target == "text":
            self.label[name].append(clean.ids[where])
            return
        entries = clean.parts[target].entries
        self.label[name].append(entries[where])
        if target == "image":
            classes = clean.sample.pictures[0].classes
            assert classes is not None
            self.classes.append(classes[where].astype(np.int64))
        else:
            self.contrast.append(entries)
            self.contrast_own.append(self.contrast_size + where)
            self.contrast_size += len(entries)

    def batch(self, rows: list[Clean]) -> Batch:
        """Everything packed, with the alignment's pairs."""
        targets = {name: Targets(_joined(self.index[name]), _joined(self.label[name])) for name in self.index}
        extra = {
            "region_classes": _joined(self.classes),
            "contrast_frames": _joined(self.contrast),
            "contrast_own": _joined(self.contrast_own),
            "contrast_row": _joined([np.full(len(entries), row) for row, entries in enumerate(self.contrast)]),
            "contrast_row_own": _joined([np.full(len(own), row) for row, own in enumerate(self.contrast_own)]),
        }
        counts = {"mlm": len(targets["mlm"].index), "regions": len(targets["regions"].index),
                  "frames": len(targets["frames"].index), "match": len(targets["match"].index)}
        pictures: dict[str, int] = {}
        for first, second in PAIRS if self.config.alignment_weight > 0 else ():
            both = [clean for clean in rows if first in clean.alone and second in clean.alone]
            name = f"{first}_{second}"
            extra[f"align_{name}"] = torch.tensor(
                [[clean.alone[first].number, clean.alone[second].number,
                  pictures.setdefault(clean.sample.key, len(pictures))] for clean in both], dtype=torch.int64
            ).reshape(-1, 3)
            counts[f"align_{name}"] = len(both)
        keys = [clean.sample.key for clean in rows]
        batch = self.packer.batch(keys, targets, extra, counts, writings=("text", "codes"))
        written = {name: torch.tensor(float(len(writing.ids))) for name, writing in batch.writings.items()}
        batch.counts.update(written)
        return batch


def _joined(pieces: list[np.ndarray]) -> torch.Tensor:
    """Pieces end to end as int64 (n,), empty when there are none."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64))
