"""What a model has been trained on, stage by stage, as its config.json keeps it; and what that makes of a test.

    pretrain --Stage--> [Stage] --finetune--> [Stage, Stage]      regime(history, origins of the test shards)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from opt.data.corpora import Corpora
from opt.data.manifest import UNKNOWN, Origin
from opt.data.shards import ShardReader

Regime = Literal["zero-shot", "in-domain", "fine-tuned", "unknown"]
"""Of a model on test shards. fine-tuned: a task was tuned on other records of their corpus. in-domain: pretraining saw
such. zero-shot: no stage did. unknown: a stage, or the shards, do not say where records come from."""


@dataclass(frozen=True)
class Corpus:
    """Shards that were trained on: where their records come from, SHA-256 over them, samples in them."""

    origins: tuple[Origin, ...]
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class Stage:
    """One run. task: the preset of pretraining, or the task of fine-tuning. samples_seen: over all epochs."""

    verb: Literal["pretrain", "finetune"]
    task: str
    corpora: tuple[Corpus, ...]
    start: str = ""
    """`model SHA` or `bert SHA`: the weights it began with; empty where all were new."""
    steps: int = 0
    samples_seen: int = 0


History = tuple[Stage, ...]
"""The stages of a model in order. One that begins with `model ...` lacks those of a model that kept none."""


def corpora_of(reader: ShardReader) -> tuple[Corpus, ...]:
    """Each folder that a reader reads."""
    readers = reader.readers if isinstance(reader, Corpora) else (reader,)
    return tuple(Corpus(one.manifest.origins, one.fingerprint, len(one)) for one in readers)


def so_far(history: History, steps: int, samples_seen: int) -> History:
    """The history with how far its last stage is."""
    return tuple([*history[:-1], *(dataclasses.replace(stage, steps=steps, samples_seen=samples_seen)
                                   for stage in history[-1:])])


def regime(history: History, origins: Iterable[Origin]) -> Regime:
    """What a test on records of `origins` says of a model with this history. Corpora are compared by their names."""
    asked = {origin.name for origin in origins}
    tuned, pretrained = (_names([stage for stage in history if stage.verb == verb])
                         for verb in ("finetune", "pretrain"))
    asked_known = asked - {UNKNOWN.name}
    if asked_known & tuned:
        return "fine-tuned"
    if UNKNOWN.name in tuned | asked:
        return "unknown"
    if asked_known & pretrained:
        return "in-domain"
    whole = bool(history) and not history[0].start.startswith("model")
    return "zero-shot" if whole and UNKNOWN.name not in pretrained else "unknown"


def _names(stages: Sequence[Stage]) -> set[str]:
    return {origin.name for stage in stages for corpus in stage.corpora for origin in corpus.origins}
