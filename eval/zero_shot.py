"""Zero-shot classification: a class is what its name says in a few sentences, a picture is what it is nearest to.

    class names x templates --System.embed--> unit vectors --mean over templates, unit length--> a vector a class
    pictures, recordings    --System.embed--> unit vectors --products--> scores --> mean average precision, hit at 1
                                                                              or, with one label each, top 1 and top 5

Prompts and their ensemble are CLIP's (arXiv 2103.00020, section 3.1.4): nothing is learned, and no label is looked at.
Where lines of the labels' files say what is absent, only verified labels count, as in `opt eval classify`.
Shape legend: N queries, C classes, T templates, E width of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.labelled import Truth, table
from eval.metrics import resample_counts
from eval.naming import read_verdicts
from eval.ranking import TIE, ranks
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task, in_batches, open_task
from opt.config import UserError
from opt.data.record import Sample

TEMPLATES = ("{}", "a {}.", "a photo of a {}.", "a picture of a {}.", "there is a {} in the picture.")
NAME_HERE = "{}"
TOP = 5


@dataclass
class ZeroShotConfig(EvalConfig):
    """Options of `opt eval zero-shot`."""

    labels: tuple[Path, ...] = ()
    """Files of lines {"image_id": ..., "labels": [...]} about the pictures of the shards; needed. All labels in them
    are classes. Where any line has "absent": [...], only labels named there or in "labels" count for a picture."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences that a class name is set into, at {}; a class is the mean of their vectors."""
    of: tuple[Literal["image", "audio"], ...] = ("image",)
    """What is classified: pictures, recordings, or each of them."""


@dataclass(frozen=True)
class Answers:
    """Samples `numbers` (N,) of one modality: their labels, and their cosines with the classes, scores (N, C)."""

    task: Task
    modality: str
    classes: Sequence[str]
    numbers: np.ndarray
    truth: Truth
    scores: np.ndarray
    about: dict[str, Any]
    """Of all its metrics."""


def zero_shot(config: ZeroShotConfig) -> None:
    """Sort pictures or recordings into classes by the names of these alone, set into a few sentences.

    Example: opt eval zero-shot runs/demo/model runs/demo/shards/test --labels runs/demo/scenes/test_scenes.jsonl
    """
    if not config.labels:
        raise UserError("--labels is missing: give the files that say what is in the pictures")
    if not config.of:
        raise UserError("--of is empty: give image, audio, or both")
    if not config.templates:
        raise UserError(f"--templates is empty: give sentences with {NAME_HERE} where the name of a class goes")
    if wrong := [one for one in config.templates if one.count(NAME_HERE) != 1]:
        raise UserError(f"--templates {wrong[0]!r} must have {NAME_HERE} once, where the name of a class goes")
    labels: dict[str, frozenset[str]] = {}
    absent: dict[str, frozenset[str]] = {}
    for there, not_there in map(read_verdicts, config.labels):
        labels.update(there)
        absent.update(not_there)
    task = open_task("zero_shot", "zero-shot", config)
    task.finish(measure(task, config, labels, absent))


def measure(
    task: Task, config: ZeroShotConfig, labels: dict[str, frozenset[str]],
    not_there: dict[str, frozenset[str]] | None = None,
) -> Findings:
    """Figures of each modality, what is absent, examples and the worst. Raises UserError where nothing can be sorted.

    labels, not_there: by key what is in a picture, and what is verified not to be.
    """
    not_there = not_there or {}
    classes = sorted(frozenset().union(*labels.values(), *not_there.values()))
    if len(classes) < 2:
        raise UserError(f"--labels names {len(classes)} class: there must be two at least to tell apart")
    unable = {modality: reason for modality in config.of if (reason := _unable(task, modality, labels))}
    if len(unable) == len(set(config.of)):
        raise UserError(f"nothing to classify: {unable[config.of[0]]}")
    class_CE = class_vectors(task, classes, config.templates)
    metrics: list[Metric] = []
    absent = {f"zero_shot.{modality}": reason for modality, reason in unable.items()}
    shown: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for modality in dict.fromkeys(config.of):
        if modality not in unable:
            answers = _answers(task, modality, classes, class_CE, labels, not_there, len(config.templates))
            if all(len(names) == 1 for names in labels.values()):
                metrics += [_hits(answers, "top1", 1)]
                if len(classes) > TOP:
                    metrics += [_hits(answers, f"top{TOP}", TOP)]
                else:
                    absent[f"zero_shot.top{TOP}.{modality}"] = f"there are only {len(classes)} classes"
            else:
                metrics += [*_precisions(answers), _hits(answers, "hit1", 1)]
            shown = shown if shown[0] else _examples(answers)
    return Findings(metrics, absent, *shown)


def class_vectors(task: Task, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Unit vectors (C, E) float32: of each class the mean of its sentences' vectors, made a unit again."""
    prompts = [Sample(f"prompt-{number}", caption=template.replace(NAME_HERE, name))
               for number, (name, template) in enumerate((n, t) for n in classes for t in templates)]
    rows = in_batches([partial(_same, prompt) for prompt in prompts],
                      lambda some: list(task.system.embed(some, ("text",)).float().cpu()), task.batch, "embed prompts")
    mean_CE = torch.stack(rows).view(len(classes), len(templates), -1).mean(1)
    return torch.nn.functional.normalize(mean_CE, dim=-1).numpy()


def _same(sample: Sample) -> Sample:
    return sample


def _members(task: Task, modality: str, labels: dict[str, frozenset[str]]) -> np.ndarray:
    """Samples with a line: each picture once, or every recording."""
    split = task.split
    numbers = np.array([number for number in split.with_all((modality,)) if split.keys[number] in labels], np.int64)
    return split.one_a_picture(numbers) if modality == "image" else numbers


def _unable(task: Task, modality: str, labels: dict[str, frozenset[str]]) -> str:
    """Why nothing of a modality can be classified; nothing where it can."""
    if not task.split.has[modality].any():
        return task.split.reading.absent((modality,))
    numbers = _members(task, modality, labels)
    if not any(labels[task.split.keys[number]] for number in numbers):
        return f"--labels names nothing in the {len(task.split)} samples of these shards that have {modality}"
    return task.refusal(lambda samples: task.system.embed(samples, (modality,)), int(numbers[0]))


def _answers(
    task: Task, modality: str, classes: Sequence[str], class_CE: np.ndarray, labels: dict[str, frozenset[str]],
    not_there: dict[str, frozenset[str]], templates: int,
) -> Answers:
    """Every sample of a modality compared with every class."""
    numbers, split = _members(task, modality, labels), task.split
    vectors_NE = task.tensor(numbers, lambda samples: task.system.embed(samples, (modality,)), f"embed {modality}")
    keys = [split.keys[number] for number in numbers]
    there_NC = table(keys, classes, labels)
    verified_NC = there_NC | table(keys, classes, not_there) if not_there else None
    resamples = resample_counts(np.unique(split.groups[numbers], return_inverse=True)[1], task.provenance.seed)
    truth = Truth(there_NC, verified_NC, resamples)
    about = {
        "modalities": (modality,), "direction": f"{modality} -> class",
        "candidates": f"{len(classes)} classes; {truth.policy}", "normaliser": "class names as the labels have them",
        "note": f"mean vector of {templates} sentence{'s' * (templates != 1)} a class",
    }  # fmt: skip
    return Answers(task, modality, classes, numbers, truth, vectors_NE @ class_CE.T, about)


def _precisions(answers: Answers) -> list[Metric]:
    """Macro and micro mean average precision."""
    truth = answers.truth
    judged = {"map": (truth.judge(answers.scores), "map/macro"),
              "map_micro": (truth.judge_micro(answers.scores), "map/micro")}  # fmt: skip
    return [
        score.metric(f"zero_shot.{name}.{answers.modality}", n=len(answers.numbers), chance=chance,
                     chance_method="share of positives", protocol=protocol, **answers.about)
        for (name, (score, protocol)), chance in zip(judged.items(), truth.chance(), strict=True)
    ]  # fmt: skip


def _hits(answers: Answers, name: str, depth: int) -> Metric:
    """Share of the samples with a label one of whose labels is among the first `depth` classes; ties share ranks."""
    truth = answers.truth
    rows = np.flatnonzero(truth.labels.any(1))
    scores_NC = np.where(truth.counted, answers.scores, -np.inf)[rows]
    found = ranks(scores_NC, truth.labels[rows], TIE) <= depth
    share = truth.labels[rows].sum(1) / truth.counted[rows].sum(1)
    return measured(
        f"zero_shot.{name}.{answers.modality}", found.astype(np.float64), answers.task.provenance.seed,
        groups=answers.task.split.groups[answers.numbers[rows]],
        chance=float(np.minimum(depth * share, 1).mean()), chance_method="random order",
        protocol=f"zero-shot/{name}", **answers.about,
    )  # fmt: skip


def _examples(answers: Answers) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first pictures, with what is in them and the nearest classes; those whose labels stand lowest."""
    firsts = set(answers.task.split.one_a_picture(answers.numbers).tolist())
    rows = [row for row, number in enumerate(answers.numbers.tolist())
            if number in firsts and answers.truth.labels[row].any()]
    precision = {row: answers.truth.ranking_precision(answers.scores, row) for row in rows}
    lowest = sorted((row for row in rows if precision[row] < 1), key=precision.__getitem__)[:WORST]
    return ([_example(answers, row) for row in rows[:EXAMPLES]],
            [_example(answers, row) | {"failure": answers.truth.failure(answers.scores, row)} for row in lowest])


def _example(answers: Answers, row: int) -> dict[str, Any]:
    task, number = answers.task, int(answers.numbers[row])
    there = np.flatnonzero(answers.truth.labels[row]).tolist()
    nearest = np.argsort(-answers.scores[row], kind="stable")[: len(there)].tolist()
    return {
        "key": task.split.keys[number], "picture": task.keep_picture(number),
        "labels": [answers.classes[place] for place in there],
        "answer": ", ".join(answers.classes[place] for place in nearest),
    }  # fmt: skip
