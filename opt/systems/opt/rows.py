"""OPT's preparer: every row hides or swaps what its task asks for, and joins one packed encoder run.

    samples --parts--> tables --tasks.py: hide, swap, write--> sequences and targets --collect.py--> Batch

    view "encoder"      one run for everything: corrupted rows first, then each sample's text, picture and speech alone
    targets             "mlm", "regions", "frames": hidden tokens of that view; "match": rows with a five-way label
    writings            "text" (DTR) and "codes" (DIR): decoder targets beside the sequence they look at
    extra               region classes, recordings of frames, and the pairs of the alignment

Corruption at the three levels of the paper (docs/opt.md): token, modality, sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opt.config import UserError
from opt.data import corrupt
from opt.data.batch import Batch
from opt.data.pack import Packer, Part
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.systems.opt.config import OPTConfig
from opt.systems.opt.tasks import TASKS, TaskRows
from opt.systems.shared.pairs import alignment_pairs
from opt.systems.system import MODALITIES


class Rows:
    """The preparer of OPT: `(samples, plan) -> Batch` for training, `inputs` for everything else. Picklable."""

    jpeg = False

    def __init__(self, config: OPTConfig, tokenizer: Tokenizer, region_width: int, speech_width: int, codebook: int):
        self.config, self.tokenizer, self.codebook = config, tokenizer, codebook
        self.region_width, self.speech_width = region_width, speech_width
        self.tasks = _tasks(config)

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Encoder tokens a sample becomes: its fused row, its swapped twin in mixing `joint`, each modality alone when
        alignment is on."""
        text = np.minimum(lengths.words + 2, self.config.text_positions) * (lengths.words > 0)
        frames = np.minimum(lengths.frames, self.config.frame_positions)
        fused = text + lengths.regions + frames + 1
        alone = fused + 2 if self.config.alignment_weight > 0 else 0
        return (2 * fused if self.config.mixing == "joint" else fused) + alone

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch of corrupted rows."""
        work, names, aligned = TaskRows(self), self.tasks.names, self.config.alignment_weight > 0
        cleans = {index: work.clean(samples[index], aligned) for index in dict.fromkeys(plan.sample.tolist())}
        strangers = set(plan.partners.ravel().tolist()) - cleans.keys() - {-1}  # partners that are another rank's rows
        cleans |= {index: work.clean(samples[index], aligned=False) for index in sorted(strangers)}
        rows = [cleans[index] for index in plan.sample.tolist()]
        for row, clean in enumerate(rows):
            partners = [cleans[index] for index in plan.partners[row].tolist() if index >= 0]
            work.row(clean, names[plan.task[row]], partners, corrupt.row_generator(int(plan.key[row])))
        targets, extra = work.targets.targets(), work.targets.extra()
        counts = {name: len(target.index) for name, target in targets.items()}
        if aligned:
            pairs = alignment_pairs(rows)
            extra.update(pairs)
            counts.update({name: len(pair) for name, pair in pairs.items()})
        keys = [clean.sample.key for clean in rows]
        return work.packer.batch(keys, targets, extra, counts, writings=("text", "codes"))

    def inputs(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Batch:
        """Uncorrupted sequences of the named modalities, one a sample. Raises UserError when one is absent.

        A picture in which the detector found nothing is there, as [CLS] alone.
        """
        packer = Packer(self.region_width, self.speech_width)
        for sample in samples:
            parts, _ = self.parts(packer, sample, modalities)
            if missing := [modality for modality in modalities if modality not in parts]:
                raise UserError(f"sample {sample.key!r} has {_lacks(sample, missing[0])}")
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
        if len(ids):
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


def _tasks(config: OPTConfig) -> Tasks:
    """What rows are asked to do, in each way of mixing (gap A1)."""
    if config.mixing == "joint":
        return Tasks(("joint",), (1.0,), ("joint",))
    shares = tuple(float(getattr(config.shares, task)) for task in TASKS)
    return Tasks(TASKS, shares, ("match",), one_a_step=config.mixing == "steps")


def _lacks(sample: Sample, modality: str) -> str:
    """What a model misses in a sample, and the way out."""
    if modality == "image" and sample.pictures:
        return "a picture without regions, which is what the model sees of one; extract again with --regions"
    return f"no {modality}; choose modalities that the shards hold"
