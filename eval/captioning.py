"""Captions: a picture described by the text decoder, with neither its caption nor its recording at hand.

pictures --system.generate_text--> captions --LabelFinder--> named objects, against the objects that are truly there
                                            \\--words--> overlap with the reference captions
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.naming import LabelFinder, read_labels
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, EvalConfig, Task, open_task
from eval.words import NORMALISER, normalise, word_f1
from opt.config import UserError
from opt.systems.system import Sampling

OBJECT_METRICS = ("caption.object_hit", "caption.object_precision")


@dataclass
class CaptionConfig(EvalConfig):
    """Options of `opt eval caption`."""

    labels: Path | None = None
    """Objects that are truly in each picture: lines {"image_id": ..., "labels": ["red circle", ...]}."""
    sampling: Sampling = Sampling()
    """How the text is searched for: --sampling.beams 4 keeps four hypotheses under way."""


def caption(config: CaptionConfig) -> None:
    """Describe pictures in words: do the captions name objects that are there, and how like the references are they?

    Example: opt eval caption runs/demo/model runs/demo/shards/test --labels runs/demo/scenes/test_scenes.jsonl
    """
    task = open_task("caption", "caption", config)
    task.finish(measure(task, config))


def measure(task: Task, config: CaptionConfig) -> Findings:
    """Metrics, absent ones with reasons, and examples. Raises UserError without a picture or with foreign labels."""
    split = task.split
    numbers = split.one_a_picture(split.with_all(("image",)))
    if not len(numbers):
        raise UserError("nothing to describe: the shards hold no picture")
    truth = {} if config.labels is None else read_labels(config.labels)
    labelled = np.array([split.keys[number] in truth for number in numbers])
    if truth and not labelled.any():
        raise UserError(f"{config.labels} has labels for none of the {len(numbers)} pictures of these shards")
    texts = task.batches(
        numbers, lambda samples: task.system.generate_text(samples, ("image",), config.sampling), "describe pictures"
    )
    written = dict(zip(numbers.tolist(), texts, strict=True))
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    if truth:
        finder = LabelFinder({label for labels in truth.values() for label in labels})
        named = {number: finder.find(text) for number, text in written.items()}
        metrics += _objects(task, numbers[labelled], named, truth, config.sampling.for_text().protocol)
        if len(metrics) < len(OBJECT_METRICS):
            absent[OBJECT_METRICS[1]] = "no caption names a labelled object"
    else:
        absent |= dict.fromkeys(OBJECT_METRICS, "no --labels given")
    references = _references(task)
    told = np.array([number for number in numbers if split.groups[number] in references], np.int64)
    if len(told):
        metrics.append(_word_overlap(task, told, written, references, config.sampling.for_text().protocol))
    else:
        absent["caption.word_f1"] = "the shards hold no caption beside a picture"
    examples = [
        {
            "key": split.keys[number],
            "picture": task.keep_picture(int(number)),
            "references": references.get(int(split.groups[number]), []),
            "caption": written[int(number)],
            "labels": sorted(truth.get(split.keys[number], ())),
        }
        for number in numbers[:EXAMPLES]
    ]  # fmt: skip
    return Findings(metrics, absent, examples)


def _objects(
    task: Task, numbers: np.ndarray, named: dict[int, frozenset[str]], truth: dict[str, frozenset[str]], protocol: str
) -> list[Metric]:
    """Share of captions that name at least one object rightly, and share of the named objects that are there."""
    there = [truth[task.split.keys[number]] for number in numbers]
    others = task.strangers(numbers)
    right = np.array([len(named[number] & labels) for number, labels in zip(numbers, there, strict=True)])
    said = np.array([len(named[number]) for number in numbers])
    guessed = np.array([len(named[other] & labels) for other, labels in zip(others, there, strict=True)])
    offered = np.array([len(named[other]) for other in others])
    about: dict[str, Any] = {
        "chance_method": "captions generated for other pictures",
        "modalities": ("image",),
        "direction": "image -> text",
        "normaliser": "a label counts when its noun and all its modifiers stand in one noun phrase",
    }
    seed, none = task.provenance.seed, int((said == 0).sum())
    metrics = [
        measured(
            OBJECT_METRICS[0], (right > 0).astype(float), seed, chance=float((guessed > 0).mean()),
            note=f"{none} of {len(numbers)} captions name no labelled object; {protocol}", **about,
        )
    ]  # fmt: skip
    if said.sum():
        chance = float(guessed.sum() / max(offered.sum(), 1))
        note = f"of {said.sum()} named objects; {protocol}"
        metrics.append(measured(OBJECT_METRICS[1], right, seed, sizes=said, chance=chance, note=note, **about))
    return metrics


def _word_overlap(
    task: Task, numbers: np.ndarray, written: dict[int, str], references: dict[int, list[str]], protocol: str
) -> Metric:
    groups = task.split.groups
    others = task.strangers(numbers)
    plain = {group: [normalise(text) for text in texts] for group, texts in references.items()}
    words = {number: normalise(written[number]) for number in numbers.tolist()}
    found = [word_f1(words[number], plain[groups[number]]) for number in numbers]
    guessed = [word_f1(words[other], plain[groups[number]]) for number, other in zip(numbers, others, strict=True)]
    return measured(
        "caption.word_f1",
        np.array(found),
        task.provenance.seed,
        chance=float(np.mean(guessed)),
        chance_method="captions generated for other pictures",
        modalities=("image",),
        direction="image -> text",
        normaliser=NORMALISER,
        note=f"F1 of words with their counts, best reference; {protocol}",
    )


def _references(task: Task) -> dict[int, list[str]]:
    """All captions of each picture, by its group number."""
    references: dict[int, list[str]] = {}
    for number in task.split.with_all(("text",)):
        references.setdefault(int(task.split.groups[number]), []).append(task.split.captions[number] or "")
    return references
