"""Probes: what can be read off frozen features of every subset of text, image and audio, as mAP.

    train shards --system.features--> (N, D) --probing.py: logistic regression--> scores of test shards
                 \\--raw features (baseline)--/                              scores --> mean average precision
                 --system.alone--> States --attention_probe.py, where asked for--/

Where a file of labels says what is absent ("absent": verified negatives, as in Open Images), only labels that are
verified, there or absent, count for a sample: in fitting as in judging. Elsewhere what is not said to be there is not.

Shape legend: N samples, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.attention_probe import frozen, look
from eval.labelled import Score
from eval.naming import read_verdicts
from eval.probing import Exam, open_exam
from eval.raw_features import raw_features, vocabulary
from eval.result import Findings, Metric
from eval.task import EXAMPLES, WORST, EvalConfig, Split, Task, open_split, open_task
from opt.config import UserError
from opt.data.record import Sample
from opt.systems.system import MODALITIES

SUBSETS = tuple(subset for size in (1, 2, 3) for subset in combinations(MODALITIES, size))
BASELINES = {
    ("text",): "bag_of_words",
    ("image",): "regions_mean",
    ("audio",): "frames_mean",
    ("image", "audio"): "regions_frames_mean",
    MODALITIES: "all_raw",
}
"""Subsets whose raw features, side by side, are probed too, and what they are called in metrics."""


@dataclass
class ClassifyConfig(EvalConfig):
    """Options of `opt eval classify`."""

    train_shards: Path | None = None
    """Folder of shards that the probe is fitted on."""
    labels: tuple[Path, ...] = ()
    """Files of lines {"image_id": ..., "labels": [...]} that between them cover both folders of shards. Where any line
    has "absent": [...], only labels named there or in "labels" count for a picture, in all files."""
    train_limit: int = 2000
    """Fit on at most so many samples."""
    probe: Literal["linear", "attention"] = "linear"
    """attention: beside the linear probe, a newly learned attentional pooler over the states of each modality."""


def classify(config: ClassifyConfig) -> None:
    """Fit a linear probe on frozen features of each subset of text, image and audio: mean average precision.

    With --probe attention, a pooler that learns what to look at is fitted, too (CoCa's use of a frozen encoder).

    Example: opt eval classify runs/demo/model runs/demo/shards/test --train-shards runs/demo/shards/train
    --labels runs/demo/scenes/train_scenes.jsonl runs/demo/scenes/test_scenes.jsonl
    """
    if config.train_shards is None:
        raise UserError("--train-shards is missing: the probe is fitted on shards other than those it is judged on")
    if not config.labels:
        raise UserError("--labels is missing: give the files that say what is in the pictures of both folders")
    if config.train_limit < 1:
        raise UserError(f"--train-limit {config.train_limit} must be at least 1")
    task = open_task("classify", "classify", config)
    train = open_split(config.train_shards, config.train_limit, task.system)
    labels: dict[str, frozenset[str]] = {}
    absent: dict[str, frozenset[str]] = {}
    for there, not_there in map(read_verdicts, config.labels):
        labels.update(there)
        absent.update(not_there)
    task.finish(measure(task, train, labels, absent, attention=config.probe == "attention"))


def measure(
    task: Task, train: Split, labels: dict[str, frozenset[str]], not_there: dict[str, frozenset[str]] | None = None,
    attention: bool = False,
) -> Findings:
    """mAP of every subset and of raw features, the paired gains between them, what is absent, and examples.

    The same samples serve all of them: those that have every modality the shards know. Raises UserError without labels.
    """
    exam = open_exam(train, task.split, labels, task.provenance.seed, not_there)
    unable = {subset: reason for subset in SUBSETS if (reason := _unable(task, exam, subset, _features(task, subset)))}
    if len(unable) == len(SUBSETS):
        raise UserError(f"nothing to probe: {unable[exam.modalities]}")
    found = {subset: probe(task, exam, subset) for subset in SUBSETS if subset not in unable}
    raw, absent = _baselines(exam)
    about = exam.about()
    metrics = _levels(exam, "classify", found)
    metrics += [
        score.metric(f"classify.baseline.{BASELINES[subset]}", modalities=subset, chance=exam.truth.chance()[0],
                     chance_method="share of positives", protocol="map/macro", **about)
        for subset, score in raw.items()
    ]
    absent |= {f"classify.map.{'_'.join(subset)}": reason for subset, reason in unable.items()}
    metrics += _gains(found, raw, about)
    if attention:
        looked, more = _looked(task, exam)
        absent |= more
        metrics += _levels(exam, "classify.attention", looked)
        metrics += [
            score.minus(found[subset]).metric(
                f"classify.attention.gain.{'_'.join(subset)}", modalities=subset, protocol="map/macro",
                note="paired difference to the linear probe over the same resamples", **about)
            for subset, score in looked.items() if subset in found
        ]  # fmt: skip
    best = found[max(found, key=len)].scores
    assert best is not None
    return Findings(metrics, absent, *_examples(task, exam, best))


def _levels(exam: Exam, name: str, found: Mapping[tuple[str, ...], Score]) -> list[Metric]:
    """Macro, then micro mean average precision of each subset."""
    macro, micro = exam.truth.chance()
    about: dict[str, Any] = {"chance_method": "share of positives", **exam.about()}
    return [
        score.metric(f"{name}.map.{'_'.join(subset)}", modalities=subset, chance=macro, protocol="map/macro", **about)
        for subset, score in found.items()
    ] + [
        exam.truth.judge_micro(score.scores).metric(
            f"{name}.map_micro.{'_'.join(subset)}", modalities=subset, chance=micro, protocol="map/micro", **about)
        for subset, score in found.items() if score.scores is not None
    ]  # fmt: skip


def _unable(task: Task, exam: Exam, subset: tuple[str, ...], ask: Callable[[list[Sample]], object]) -> str:
    """Why `subset` cannot be probed: the shards lack it, or the system refuses; nothing where it can."""
    if lacking := [name for name in subset if name not in exam.modalities]:
        return task.split.reading.absent(lacking)
    return task.refusal(ask, int(exam.test_numbers[0]))


def _features(task: Task, subset: tuple[str, ...]) -> Callable[[list[Sample]], torch.Tensor]:
    return lambda samples: task.system.features(samples, subset)


def _looked(task: Task, exam: Exam) -> tuple[dict[tuple[str, ...], Score], dict[str, str]]:
    """Every subset by an attentional pooler over the states of its modalities, and the absent ones with reasons."""
    def alone(samples: list[Sample]) -> object:
        return [task.system.alone(samples, name) for name in subset]

    found: dict[tuple[str, ...], Score] = {}
    absent: dict[str, str] = {}
    fitted, judged = {}, {}
    for subset in SUBSETS:  # single modalities first
        if reason := _unable(task, exam, subset, alone):
            absent[f"classify.attention.map.{'_'.join(subset)}"] = reason
            continue
        if len(subset) == 1:
            fitted[subset[0]] = frozen(task, subset[0], exam.train_numbers, exam.train)
            judged[subset[0]] = frozen(task, subset[0], exam.test_numbers, exam.test)
        parts = [{name: side[name] for name in subset} for side in (fitted, judged)]
        found[subset] = look(exam, parts[0], parts[1], task.system.device)
    return found, absent


def probe(task: Task, exam: Exam, subset: tuple[str, ...]) -> Score:
    """The model's features of `subset`, probed."""
    features, name = _features(task, subset), " + ".join(subset)
    fitted_ND = task.tensor(exam.train_numbers, features, f"features of {name}, training", exam.train)
    return exam.probe(fitted_ND, task.tensor(exam.test_numbers, features, f"features of {name}"))


def _baselines(exam: Exam) -> tuple[dict[tuple[str, ...], Score], dict[str, str]]:
    """Raw features probed, by subset, and the absent ones with reasons: those that some sample lacks."""
    columns = vocabulary(exam.train.captions[number] for number in exam.train_numbers)
    sides = [
        [raw_features(split.sample(int(number)), columns) for number in numbers]
        for split, numbers in ((exam.train, exam.train_numbers), (exam.test, exam.test_numbers))
    ]
    found: dict[tuple[str, ...], Score] = {}
    absent: dict[str, str] = {}
    for subset, name in BASELINES.items():
        lacking = sum(not set(subset) <= set(vectors) for side in sides for vectors in side)
        if lacking:
            absent[f"classify.baseline.{name}"] = f"{lacking} samples lack such features"
            continue
        fitted_ND, judged_ND = (
            np.stack([np.concatenate([vectors[part] for part in subset]) for vectors in side]) for side in sides
        )
        found[subset] = exam.probe(fitted_ND, judged_ND)
    return found, absent


def _gains(
    found: dict[tuple[str, ...], Score], raw: dict[tuple[str, ...], Score], about: dict[str, Any]
) -> list[Metric]:
    """Paired differences: all three over each one, each modality added to one or two others, the model over raw."""
    note = "paired difference of mAP over the same resamples"
    pairs: list[tuple[str, tuple[str, ...], Score]] = [
        (f"gain_over.{name}", MODALITIES, found[name,]) for name in MODALITIES if {MODALITIES, (name,)} <= set(found)
    ]
    pairs += [
        (f"gain.{'_'.join(more)}_over_{'_'.join(less)}", more, found[less])
        for more, less in product(found, found)
        if set(less) < set(more) and len(less) == len(more) - 1
    ]
    pairs += [(f"gain.{'_'.join(subset)}_over_{BASELINES[subset]}", subset, score) for subset, score in raw.items()
              if subset in found]
    return [
        found[more].minus(less).metric(f"classify.{name}", modalities=more, protocol="map/macro", note=note, **about)
        for name, more, less in pairs
    ]


def _examples(task: Task, exam: Exam, scores_NC: np.ndarray) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first pictures, with what is in them and what the probe finds likeliest; those whose labels rank lowest."""
    pictures = set(task.split.one_a_picture(exam.test_numbers).tolist())
    rows = [row for row, number in enumerate(exam.test_numbers.tolist())
            if number in pictures and exam.test_labels[row].any()]
    precision = {row: exam.truth.ranking_precision(scores_NC, row) for row in rows}
    lowest = sorted((row for row in rows if precision[row] < 1), key=precision.__getitem__)[:WORST]
    return ([_example(task, exam, scores_NC, row) for row in rows[:EXAMPLES]],
            [_example(task, exam, scores_NC, row, failed=True) for row in lowest])  # fmt: skip


def _example(task: Task, exam: Exam, scores_NC: np.ndarray, row: int, failed: bool = False) -> dict[str, Any]:
    number, there = int(exam.test_numbers[row]), np.flatnonzero(exam.test_labels[row])
    likeliest = np.argsort(-scores_NC[row], kind="stable")[: len(there)]
    example = {
        "key": task.split.keys[number], "picture": task.keep_picture(number),
        "labels": [exam.classes[place] for place in there], "answer": ", ".join(exam.classes[i] for i in likeliest),
    }  # fmt: skip
    if failed:
        example["failure"] = exam.truth.failure(scores_NC, row)
    return example
