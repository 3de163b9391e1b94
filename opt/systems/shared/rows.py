"""The preparer of systems with towers: each modality of a sample is a sequence in a view of its own.

    samples --parts--> tables --> views "text", "image", "audio" --`ask` of the system--> targets, writings --> Batch

    extra "align_text_image", ...   sequences of samples that have both, and their picture (pairs.py)
    extra "row_key"                 rng key of each row, for what is drawn on the device
    host  "rows" (B, 3)             sequence of each row's text, picture and speech, ABSENT where it has none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt.config import UserError
from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import FRAME, PATCH, TEXT, Packer, Part, Place
from opt.data.pixels import see_all
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.states import ABSENT
from opt.systems.shared.pairs import alignment_pairs, picture_number
from opt.systems.system import MODALITIES

VIEWS = {"text": (TEXT,), "image": (PATCH,), "audio": (FRAME,)}


@dataclass(frozen=True)
class TowerRow:
    """A row of a batch: its sample, the words' ids without special tokens, its parts in the tables, the sequence of
    each by itself, and its own random numbers."""

    sample: Sample
    ids: np.ndarray
    parts: dict[str, Part]
    alone: dict[str, Place]
    rng: np.random.Generator


@dataclass
class Asked:
    """What a system asks of the rows of a batch, beside the pairs: goes into the Batch as it is."""

    targets: dict[str, Targets] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)
    writings: tuple[str, ...] = ()


class TowerRows:
    """`(samples, plan) -> Batch` for training, `inputs` for everything else. Picklable.

    config: has `sight`, `text_positions`, `frame_positions`. modalities: those that the system reads.
    """

    jpeg = True
    tasks = Tasks(("pair",), (1.0,))

    def __init__(self, config: Any, tokenizer: Tokenizer, speech_width: int, modalities: Sequence[str]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.speech_width, self.modalities = speech_width, tuple(modalities)

    def sequence(self, ids: np.ndarray) -> np.ndarray:
        """A caption's ids between the special tokens that the text tower reads."""
        return np.concatenate([[self.tokenizer.cls], ids, [self.tokenizer.sep]])

    def words(self, caption: str) -> np.ndarray:
        """A caption's ids; [UNK] where it is of characters that no word has, so that it is never empty."""
        ids = self.tokenizer.encode(caption, self.config.text_positions - 2)
        return ids if len(ids) else np.array([self.tokenizer.unk])

    def view(self, modality: str) -> str:
        """The view in which sequences of one modality stand."""
        return modality

    def ask(self, packer: Packer, rows: list[TowerRow]) -> Asked:
        """What else the rows are asked: masked words, words to write. Nothing by default."""
        return Asked()

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of each modality's own sequence."""
        return np.maximum(sum(self.sizes(lengths).values()), 1)

    def sizes(self, lengths: Lengths) -> dict[str, np.ndarray]:
        """Tokens of each modality by itself, (n,), special ones counted; 0 where it is absent."""
        config = self.config
        text = np.minimum(lengths.words + 2, config.text_positions) * (lengths.words > 0)
        image = (config.sight.most + 1) * (lengths.jpegs > 0)
        audio = (np.minimum(lengths.frames, config.frame_positions) + 1) * (lengths.frames > 0)
        return {name: size for name, size in zip(MODALITIES, (text, image, audio), strict=True)
                if name in self.modalities}

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch."""
        packer = self.packer()
        rows = [self._row(packer, samples[int(number)], corrupt.row_generator(int(key)))
                for number, key in zip(plan.sample, plan.key, strict=True)]
        asked, pairs = self.ask(packer, rows), alignment_pairs(rows)
        extra = {**pairs, **asked.extra, "row_key": torch.from_numpy(plan.key.view(np.int64)),
                 "picture": torch.tensor([picture_number(row.sample) for row in rows], dtype=torch.int64)}
        numbers = [[row.alone[name].number if name in row.alone else ABSENT for name in MODALITIES] for row in rows]
        host = {"rows": np.array(numbers, np.int64).reshape(-1, 3), **asked.host}
        counts = {**{name: len(pair) for name, pair in pairs.items()}, **asked.counts}
        return packer.batch([row.sample.key for row in rows], asked.targets, extra, counts, asked.writings, host)

    def inputs(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Batch:
        """Uncorrupted sequences of the named modalities, one a sample; a picture of a clip is one each.

        host "pictures" (B,): how many each sample has. Raises UserError where a modality is absent.
        """
        packer = self.packer()
        for sample in samples:
            parts = [*self.parts(packer, sample, modalities)[0]]
            if missing := [name for name in modalities if name not in parts]:
                raise UserError(f"sample {sample.key!r} has no {missing[0]}; choose modalities that the shards hold")
        host = {"pictures": np.array([len(sample.pictures) for sample in samples], np.int64)}
        return packer.batch([sample.key for sample in samples], {}, {}, {}, (), host)

    def packer(self) -> Packer:
        """An empty one with this system's tables and views."""
        return Packer(1, max(self.speech_width, 1), 3 * self.config.sight.patch**2, (FRAME, PATCH), VIEWS)

    def _row(self, packer: Packer, sample: Sample, rng: np.random.Generator) -> TowerRow:
        """A sample in training: of several pictures the first."""
        parts, ids, alone = self.parts(packer, sample, self.modalities, rng)
        return TowerRow(sample, ids, parts, alone, rng)

    def parts(
        self, packer: Packer, sample: Sample, modalities: Sequence[str], rng: np.random.Generator | None = None
    ) -> tuple[dict[str, Part], np.ndarray, dict[str, Place]]:
        """The sample's parts in the tables, absent ones left out, its words' ids, and the sequence of each part; of
        several pictures the last."""
        tables, ids = self.tables(packer, sample, modalities, rng, None if rng is None else 1)
        alone = {name: [self.lone(packer, name, part) for part in parts][-1] for name, parts in tables.items()}
        return {name: parts[-1] for name, parts in tables.items()}, ids, alone

    def tables(
        self, packer: Packer, sample: Sample, modalities: Sequence[str], rng: np.random.Generator | None = None,
        pictures: int | None = None,
    ) -> tuple[dict[str, list[Part]], np.ndarray]:
        """What the sample has of each modality in the tables, at most so many `pictures`, and its words' ids. rng:
        draws what training sees of pictures."""
        tables: dict[str, list[Part]] = {}
        ids = np.zeros(0, np.int64)
        if "text" in modalities and sample.caption:
            ids = self.words(sample.caption)
            tables["text"] = [packer.text(self.sequence(ids))]
        if "image" in modalities and sample.pictures:
            tables["image"] = [packer.patches(each) for each in see_all(sample, self.config.sight, rng, pictures)]
        if "audio" in modalities and sample.speech is not None:
            tables["audio"] = [packer.frames(sample.speech[: self.config.frame_positions])]
        return tables, ids

    def lone(self, packer: Packer, modality: str, part: Part) -> Place:
        """The sequence of a part by itself, pictures and speech behind their learned first entries."""
        first = [] if modality == "text" else [packer.first(part.table)]
        return packer.sequence(self.view(modality), [*first, part])
