"""The protocol of a system: what the trainer and the evaluations may ask of every model.

    preparer   a small picklable object without weights: samples and row plans -> Batch, in loader workers
    forward    Batch -> Output(terms, carry); reads like the paper's figure
    abilities  embed, alone and fuse, features, generate_text, generate_codes, answer: a missing one is a clear error

A system `name` lives in `opt/systems/name.py`; `load("opt.tiny")` calls its function `tiny()`. There is no registry.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.manifest import Manifest
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.sampling import Sampling
from opt.nn.states import States
from opt.objectives.term import Term
from opt.recipe import LoopConfig, OptimConfig, Stage

MODALITIES = ("text", "image", "audio")


@dataclass(frozen=True)
class Preset:
    """What a preset's function returns: the model's configuration, and the recipe it is meant to be trained by."""

    model: Any
    loop: LoopConfig = LoopConfig()
    optim: OptimConfig = OptimConfig()
    vocabulary_size: int = 2000
    """Largest vocabulary trained on the captions, where none is given."""
    stages: tuple[Stage, ...] = ()
    """In which order it is trained in stages (`opt stages`), where that is how; the model's configuration then has a
    `stage`, which says what one run by itself asks."""


@dataclass(frozen=True)
class Progress:
    """How far training is: drives ramps and annealing. `fraction` runs from 0 to 1."""

    step: int
    fraction: float


@dataclass(frozen=True)
class Output:
    """What a forward returns: the terms of the loss by name, and what must outlive the step."""

    terms: dict[str, Term]
    carry: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFacts:
    """What a system must know of the shards it reads: widths and sizes fixed by the extractors. 0 means absent.

    codebook: image codes that exist; codes_grid: rows, and columns, of those stored of a picture (0 also where an older
    model does not say). speech_codebooks: entries of each codebook of stored speech codes.
    """

    region_width: int
    region_classes: tuple[str, ...]
    speech_width: int
    frame_rate: float
    codebook: int
    extractors: dict[str, Any] = field(default_factory=dict)
    speech_codebooks: tuple[int, ...] = ()
    codes_grid: int = 0

    def require_same(self, manifest: Manifest, folder: Path) -> None:
        """Raises UserError where the shards of `folder` hold other features than a model of these facts reads."""
        here, read = manifest.codes_grid if "codes" in manifest.extractors else 0, self.codes_grid
        if here and read and here != read:
            raise UserError(f"{folder}: its pictures are told in {here} x {here} codes, those the model was trained on "
                            f"in {read} x {read}; extract again with --codes-grid {read}")
        for kind, about in manifest.extractors.items():
            trained = self.extractors.get(kind, about)
            for name in ("weights_sha256", "settings"):
                if trained.get(name) != about.get(name):
                    raise UserError(
                        f"{folder}: its {kind} come from another extractor than those the model was trained on "
                        f"({name} {about.get(name)}, not {trained.get(name)}); extract again as for training"
                    )
        for kind, width in (("regions", "region_width"), ("audio", "speech_width")):
            here, read = getattr(manifest, width), getattr(self, width)
            if here and not read:
                raise UserError(f"{folder} holds {kind}, which the model never saw: extract again with --{kind} none")
            if here and here != read:
                raise UserError(f"{folder}: its {kind} are {here} numbers, not {read}; extract again as for training")


class Preparer(Protocol):
    """Turns samples into a batch: tokenises, corrupts and packs. All randomness comes from each row's rng key."""

    tasks: Tasks
    jpeg: bool
    """Whether samples come with their pictures' jpegs."""

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch: ...

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens that each sample becomes: int64 (B,)."""
        ...


class System(nn.Module):
    """Base of all systems. Abilities a system lacks raise UserError; a system overrides what it can."""

    name: ClassVar[str]
    config_type: ClassVar[type]
    reads_text: ClassVar[bool] = True
    """Whether it needs a tokenizer; one that does not is built with None."""
    reads_codes: ClassVar[bool] = False
    """Whether it needs image codes although it sees stored pixels: they are what it predicts."""
    config: Any
    tokenizer: Tokenizer
    facts: DataFacts

    def preparer(self) -> Preparer:
        raise self._cannot("be trained")

    def forward(self, batch: Batch, progress: Progress) -> Output:
        raise self._cannot("be trained")

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Moves twins, queues and clamps, once per optimizer step: one carry for each micro-batch. Nothing to move by
        default. kept: bool, on the device; False where the step was skipped: then what was carried must not enter."""

    def illustrate(self, batch: Batch) -> Tensor | None:
        """A picture of what has been learned, uint8 (height, width, 3) on any device; drawn when a state is saved, in
        evaluation mode. None by default: there is nothing to see."""
        return None

    def embed(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) float32 in the space all modalities share; several modalities make one query."""
        raise self._cannot("embed")

    def alone(self, samples: Sequence[Sample], modality: str) -> States:
        """What one modality of each sample is before others join it: kept by whoever pairs it many times."""
        raise self._cannot("match")

    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Log-odds (P,) float32 that samples rows[modality][p] of parts[modality] belong together, over all modalities
        named. Each costs one fusion pass."""
        raise self._cannot("match")

    def match_probability(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """Probability (P,) float32 that the samples of `fuse` belong together: of its log-odds, or of both logits of a
        head where `fuse` is one of two."""
        return self.fuse(parts, rows).sigmoid()

    @property
    def cosine_weight(self) -> float:
        """What a cosine of `embed` counts beside the log-odds of `fuse` where candidates are ordered by both: 0, they
        are ordered by matching alone (ALBEF, section 4); what they were trained at, the two add up (as in BLIP)."""
        return 0.0

    def score(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """Log-odds (B,) float32 that the named parts of each sample belong together."""
        own = np.arange(len(samples))
        return self.fuse({name: self.alone(samples, name) for name in modalities}, dict.fromkeys(modalities, own))

    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """Pooled hidden states (B, D) float32, for a linear probe."""
        raise self._cannot("give features")

    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        """One text a sample, written from the named modalities alone."""
        raise self._cannot("write text")

    def generate_codes(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> Tensor:
        """Image codes (B, 8, 8) int64, drawn from the named modalities alone."""
        raise self._cannot("draw pictures")

    def answer(
        self, samples: Sequence[Sample], candidates: Sequence[str] | None = None, shortlist: int = 0
    ) -> list[str]:
        """One answer a sample, whose caption is a question about its picture or pictures.

        candidates: the one whose tokens and end have the highest probability together (the sum of their logarithms, not
        divided by the length). shortlist: of so many whose first token is likeliest; 0: of all.
        """
        raise self._cannot("answer questions")

    @property
    def answering(self) -> str:
        """How `answer` answers without candidates, in words for the note beside a figure."""
        return ""

    @property
    def extractors(self) -> frozenset[str]:
        """The kinds of extractors whose features it reads; one that sees stored pixels needs none for pictures, but
        for the codes that it predicts."""
        pixels = self.preparer().jpeg
        widths = {"regions": 0 if pixels else self.facts.region_width, "audio": self.facts.speech_width,
                  "codes": 0 if pixels and not self.reads_codes else self.facts.codebook}
        return frozenset(kind for kind, width in widths.items() if width)

    def require_same(self, manifest: Manifest, folder: Path) -> None:
        """Raises UserError where features that the system reads come from other networks than those of its training;
        what others made of the rest is nothing to it."""
        kinds = self.extractors
        self.facts.require_same(dataclasses.replace(
            manifest, extractors={kind: about for kind, about in manifest.extractors.items() if kind in kinds},
            region_width=manifest.region_width if "regions" in kinds else 0,
            speech_width=manifest.speech_width if "audio" in kinds else 0,
        ), folder)  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _cannot(self, ability: str) -> UserError:
        return UserError(f"system {self.name!r} cannot {ability}; choose a system that can (see docs/systems.md)")


def names() -> list[str]:
    """Names of all systems: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__import__("opt.systems", fromlist=["x"]).__path__)
                  if module.name not in ("system", "shared"))


def load(name: str) -> Preset:
    """A preset such as "opt.tiny": opt/systems/opt, function tiny(). Raises UserError."""
    system, _, preset = name.partition(".")
    module = system_module(system)
    if preset not in presets(module):
        raise UserError(f"unknown preset {name!r}; there are {', '.join(f'{system}.{p}' for p in presets(module))}")
    return getattr(module, preset)()


def presets(module: Any) -> list[str]:
    """Functions of a system's file that take nothing and return a Preset."""
    return [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
            and value.__module__ == module.__name__ and not inspect.signature(value).parameters]


def system_module(system: str) -> Any:
    """The module of a system by its name. Raises UserError that lists the systems there are."""
    if system not in names():
        raise UserError(f"unknown system {system!r}; there are {', '.join(names())}")
    return importlib.import_module(f"opt.systems.{system}")


def system_type(system: str) -> type[System]:
    """The `System` subclass of that name in its module. Raises UserError for a system there is not."""
    module = system_module(system)
    return next(value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, System)
                and getattr(value, "name", None) == system)


def build(system: str, config: Any, tokenizer: Tokenizer | None, facts: DataFacts) -> System:
    """The system named `system` with this configuration, newly initialised."""
    return system_type(system)(config, tokenizer, facts)


def compose(text: Sample | None = None, image: Sample | None = None, audio: Sample | None = None) -> Sample:
    """A sample made of one sample's caption, another's pictures and a third's speech: what matching scores."""
    base = text or image or audio
    if base is None:
        raise ValueError("compose needs at least one part")
    return dataclasses.replace(
        base,
        caption=text.caption if text else None,
        pictures=image.pictures if image else (),
        speech=audio.speech if audio else None,
        speech_codes=audio.speech_codes if audio else None,
    )
