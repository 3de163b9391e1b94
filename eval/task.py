"""What every evaluation begins and ends with: a model and a split opened, samples in batches, one result file written.

    EvalConfig --open_task--> Task(system, split, provenance) --measure--> metrics --Task.finish--> JSON + table

Each verb brings its own `measure`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from tyro.conf import Positional, arg

from eval.provenance import provenance_of
from eval.reads import FEATURES, Reads, open_shards, reads
from eval.result import Findings, Provenance, Result, command_line, results_table, write_result
from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.data.record import Sample
from opt.data.shards import ShardReader
from opt.files import make_folder, write_atomic
from opt.progress import progress
from opt.systems.system import System

EXAMPLES = 24
"""How many samples each evaluation keeps for the report: the first of the split, never chosen."""
WORST = 12
"""How many that failed worst are kept beside them."""

Answer = TypeVar("Answer")


@dataclass
class EvalConfig:
    """What all evaluations need."""

    model: Annotated[Path, Positional, arg(metavar="MODEL")]
    """Folder of a saved model, such as runs/demo/model."""
    shards: Annotated[Path, Positional, arg(metavar="SHARDS")]
    """Folder of shards that the model has not seen."""
    out: Path | None = None
    """Folder for the results; by default `results` beside the model's folder."""
    limit: int | None = None
    """Use only the first so many samples."""
    batch: int = 64
    """Samples in one call of the model: speed and memory."""
    seed: int = 0
    """Seed of bootstrap intervals and chance levels."""


class Split:
    """Samples of a reader, the first `limit`, and which modalities each of them has for a system that reads so."""

    def __init__(self, reader: ShardReader, limit: int | None = None, reading: Reads = FEATURES) -> None:
        self.reader, self.reading = reader, reading
        count = len(reader) if limit is None else min(limit, len(reader))
        if limit is not None and limit < 1:
            raise UserError(f"--limit {limit} must be at least 1")
        if not count:
            raise UserError(f"{reader.place} holds no samples, so there is nothing to evaluate")
        self.keys = list(islice(reader.keys(), count))
        self.groups = np.unique(self.keys, return_inverse=True)[1]
        """Number of the picture that each sample belongs to, int64 (N,)."""
        sizes = reader.lengths
        self.has = {modality: there[:count] for modality, there in reading.present(sizes).items()}
        """Which samples have each modality: bool (N,) by name."""
        captions = reader.captions()
        self.captions = [next(captions) if words else None for words in sizes.words[:count]]

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, number: int, jpeg: bool = False) -> Sample:
        """With jpegs where they are asked for, or the system looks at them."""
        return self.reader.sample(number, jpeg=jpeg or self.reading.pixels)

    def with_all(self, modalities: Sequence[str]) -> np.ndarray:
        """Numbers of the samples that have all of `modalities`, in order."""
        return np.flatnonzero(np.all([self.has[modality] for modality in modalities], axis=0))

    def one_a_picture(self, numbers: np.ndarray) -> np.ndarray:
        """The first of `numbers` for each key, in order."""
        return np.sort(numbers[np.unique(self.groups[numbers], return_index=True)[1]])


@dataclass
class Task:
    """One evaluation under way."""

    name: str
    system: System
    split: Split
    folder: Path
    batch: int
    provenance: Provenance
    began: float

    def batches(
        self,
        numbers: np.ndarray,
        answer: Callable[[list[Sample]], Sequence[Answer]],
        label: str,
        split: Split | None = None,
    ) -> list[Answer]:
        """`answer` of the samples `numbers`, of the task's split or another, in order; see `in_batches`."""
        sample = (split or self.split).sample
        return in_batches([partial(sample, int(number)) for number in numbers], answer, self.batch, label)

    def tensor(
        self,
        numbers: np.ndarray,
        answer: Callable[[list[Sample]], torch.Tensor],
        label: str,
        split: Split | None = None,
    ) -> np.ndarray:
        """As `batches` for an answer that is a tensor (B, ...): float32 (len(numbers), ...) in numpy.

        Raises UserError where it is not finite.
        """

        def rows(samples: list[Sample]) -> list[np.ndarray]:
            values_B = answer(samples).float().cpu().numpy()
            require_finite(values_B, [sample.key for sample in samples], label)
            return list(values_B)

        return np.stack(self.batches(numbers, rows, label, split))

    def refusal(self, ask: Callable[[list[Sample]], object], number: int) -> str:
        """What the system says where it lacks an ability, tried on one sample before any work; nothing where it can."""
        try:
            with torch.inference_mode():
                ask([self.split.sample(number)])
        except UserError as error:
            return str(error)
        return ""

    def strangers(self, numbers: np.ndarray) -> np.ndarray:
        """For each of `numbers` one that shows another picture, drawn by the seed: a partner for chance levels.

        A partner shows the same picture only where one picture makes up most of `numbers`.
        """
        groups = self.split.groups
        place = np.random.default_rng(self.provenance.seed).permutation(groups.max() + 1)
        order = numbers[np.argsort(place[groups[numbers]], kind="stable")]  # narrations of a picture lie together
        longest = int(np.unique(groups[numbers], return_counts=True)[1].max())
        partner = dict(zip(order.tolist(), np.roll(order, longest).tolist(), strict=True))
        return np.array([partner[number] for number in numbers.tolist()])

    def keep_picture(self, number: int) -> str | None:
        """Copy the sample's picture, if it has one, to the results for the report; returns its path in their folder."""
        sample = self.split.sample(number, jpeg=True)
        jpeg = sample.pictures[0].jpeg if sample.pictures else None
        if jpeg is None:
            return None
        path = self.folder / "pictures" / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, jpeg)
        return str(path.relative_to(self.folder))

    def finish(self, findings: Findings) -> Result:
        """Write `<task>.json`, print its table and return the result."""
        seconds = round(time.monotonic() - self.began, 2)
        result = Result(
            self.name, tuple(findings.metrics), self.provenance, seconds, dict(findings.absent),
            list(findings.examples), list(findings.worst),
        )  # fmt: skip
        path = write_result(result, self.folder)
        print(results_table([result]), f"\nwritten to {path}\n", sep="\n")
        return result


def in_batches(
    loads: Sequence[Callable[[], Sample]], answer: Callable[[list[Sample]], Sequence[Answer]], batch: int, label: str
) -> list[Answer]:
    """Load samples a batch at a time and collect the answers, in order; gradients off, with a progress bar."""
    answers: list[Answer] = []
    with torch.inference_mode(), progress(label, total=len(loads), unit="samples") as bar:
        for first in range(0, len(loads), batch):
            samples = [load() for load in loads[first : first + batch]]
            answers += answer(samples)
            bar.advance(len(samples))
    return answers


def require_finite(values_B: np.ndarray, keys: Sequence[str], label: str) -> None:
    """Raises UserError where one of the values (B, ...) is not finite: nothing compares with NaN, so that nothing would
    stand before it and the right answer would seem to be the first."""
    broken = ~np.isfinite(values_B).reshape(len(values_B), -1).all(axis=1)
    if broken.any():
        raise UserError(f"{label}: the model gives no finite number for {keys[int(np.argmax(broken))]}: its weights, "
                        "or these shards, are damaged; `opt shards verify --deep` checks the shards")


def open_task(name: str, verb: str, config: EvalConfig) -> Task:
    """Open the model and the shards of `config`.

    Raises UserError when either is missing, the model's weights are not finite or the split is empty.
    """
    began = time.monotonic()
    if config.batch < 1:
        raise UserError(f"--batch {config.batch} must be at least 1")
    if config.seed < 0:
        raise UserError(f"--seed {config.seed} must be at least 0")
    system = from_pretrained(config.model)
    broken = [name for name, weight in system.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise UserError(f"{config.model}: {broken[0]} holds NaN or infinity, as after training that diverged; give a "
                        "model of an earlier step")
    split = open_split(config.shards, config.limit, system)
    command = _command(verb, config)
    provenance = provenance_of(config.model, system, split.reader, split.keys, config.seed, command)
    folder = config.out or Path(normpath(config.model / ".." / "results"))  # the model may be called "."
    make_folder(folder)
    return Task(name, system, split, folder, config.batch, provenance, began)


def _command(verb: str, config: EvalConfig) -> str:
    """`command_line`, with what is changed of options in groups: `--sampling.beams 4`."""
    groups: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(config) if dataclasses.is_dataclass(field.default)
    }
    changed = [
        f"--{group}.{inner.name.replace('_', '-')} {getattr(getattr(config, group), inner.name)}"
        for group, usual in groups.items()
        for inner in dataclasses.fields(usual)
        if getattr(getattr(config, group), inner.name) != getattr(usual, inner.name)
    ]
    return " ".join([command_line(verb, dataclasses.replace(config, **groups)), *changed])


def open_split(folder: Path, limit: int | None, system: System) -> Split:
    """Open shards for `system`. Raises UserError when they are none, empty, or made by other networks than it reads."""
    return Split(open_shards(folder, system), limit, reads(system))
