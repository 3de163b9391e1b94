"""Linear probe: what can be read off frozen features of every subset of text, image and audio, as mAP.

    train shards --system.features--> (N, D) --logistic regression, L2 by a held-out part--> scores of test shards
                 \\--raw features (baseline)--/                              scores --> mean average precision

All classes of one subset and all strengths of L2 are fitted at once, full batch. Shape legend: N samples, D feature
width, C classes, P strengths, S bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.metrics import interval, mean_average_precision, resample_counts
from eval.naming import read_labels
from eval.raw_features import raw_features, vocabulary
from eval.result import Findings, Metric
from eval.task import EvalConfig, Split, Task, open_split, open_task
from opt.config import UserError
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
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT_SHARE = 0.2
STEPS = 100


@dataclass
class ClassifyConfig(EvalConfig):
    """Options of `opt eval classify`."""

    train_shards: Path | None = None
    """Folder of shards that the probe is fitted on."""
    labels: tuple[Path, ...] = ()
    """Files of lines {"image_id": ..., "labels": [...]} that between them cover both folders of shards."""
    train_limit: int = 2000
    """Fit on at most so many samples."""


class Score(NamedTuple):
    """mAP of one kind of features: the value and that of every bootstrap resample (S,)."""

    value: float
    draws: np.ndarray

    def metric(self, name: str, **about: Any) -> Metric:
        return Metric(name, self.value, interval=interval(self.draws, self.value), **about)

    def minus(self, other: Score) -> Score:
        """The paired difference: both must come from the same `Exam`."""
        return Score(self.value - other.value, self.draws - other.draws)


@dataclass(frozen=True)
class Exam:
    """Samples to learn from and others to be judged on: the same for all kinds of features, so that they compare."""

    train: Split
    test: Split
    train_numbers: np.ndarray
    test_numbers: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    """(N, C) bool, as `train_labels`; the columns are `classes`."""
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    """Those that both folders know; every sample has all of them."""
    resamples: np.ndarray
    """How often each test sample counts in each bootstrap resample, (S, N)."""
    seed: int

    def judge(self, scores_NC: np.ndarray) -> Score:
        """mAP of scores for the test samples, on the same resamples of pictures each time."""
        value = float(mean_average_precision(scores_NC, self.test_labels))
        return Score(value, mean_average_precision(scores_NC, self.test_labels, self.resamples))

    def probe(self, fitted_ND: np.ndarray, judged_ND: np.ndarray) -> Score:
        """Fit on features of the training samples and judge those of the test samples.

        The strength of L2 is the one that does best on a held-out part of the training pictures.
        """
        mean, spread = fitted_ND.mean(0), fitted_ND.std(0) + 1e-5
        fitted_ND, judged_ND = (fitted_ND - mean) / spread, (judged_ND - mean) / spread
        pictures = np.random.default_rng(self.seed).random(self.train.groups.max() + 1)
        held = pictures[self.train.groups[self.train_numbers]] < HELD_OUT_SHARE
        tried = fit(fitted_ND[~held], self.train_labels[~held], STRENGTHS)
        judgements = [mean_average_precision(logits(fitted_ND[held], one), self.train_labels[held]) for one in tried]
        best = STRENGTHS[int(np.argmax(judgements))]
        return self.judge(logits(judged_ND, fit(fitted_ND, self.train_labels, (best,))[0]))

    def about(self) -> dict[str, Any]:
        """The protocol, for metrics."""
        present = self.test_labels.any(0).sum()
        candidates = f"{present} of {len(self.classes)} classes occur; {len(self.train_numbers)} training samples"
        return {
            "n": len(self.test_numbers),
            "candidates": candidates,
            "normaliser": "macro over classes with a positive, step-wise average precision",
        }


def classify(config: ClassifyConfig) -> None:
    """Fit a linear probe on frozen features of each subset of text, image and audio: mean average precision.

    Example: opt eval classify runs/demo/model runs/demo/shards/test --train-shards runs/demo/shards/train
    --labels runs/demo/scenes/train_scenes.jsonl runs/demo/scenes/test_scenes.jsonl
    """
    if config.train_shards is None:
        raise UserError("--train-shards is missing: the probe is fitted on shards other than those it is judged on")
    if not config.labels:
        raise UserError("--labels is missing: give the files that say what is in the pictures of both folders")
    task = open_task("classify", "classify", config)
    train = open_split(config.train_shards, config.train_limit, task.system)
    labels = {key: names for path in config.labels for key, names in read_labels(path).items()}
    task.finish(measure(task, train, labels))


def measure(task: Task, train: Split, labels: dict[str, frozenset[str]]) -> Findings:
    """mAP of every subset and of raw features, the paired gains between them, and what is absent.

    The same samples serve all of them: those that have every modality the shards know. Raises UserError without labels.
    """
    exam = open_exam(train, task.split, labels, task.provenance.seed)
    found = {subset: probe(task, exam, subset) for subset in SUBSETS if set(subset) <= set(exam.modalities)}
    raw, absent = _baselines(exam)
    about = exam.about()
    positives = float(exam.test_labels[:, exam.test_labels.any(0)].mean())
    level: dict[str, Any] = {"chance": positives, "chance_method": "share of positives"}
    metrics = [
        score.metric(f"classify.map.{'_'.join(subset)}", modalities=subset, **level, **about)
        for subset, score in found.items()
    ]
    metrics += [
        score.metric(f"classify.baseline.{BASELINES[subset]}", modalities=subset, **level, **about)
        for subset, score in raw.items()
    ]
    absent |= {
        f"classify.map.{'_'.join(subset)}": f"the shards lack {', '.join(sorted(set(subset) - set(exam.modalities)))}"
        for subset in SUBSETS
        if subset not in found
    }
    return Findings(metrics + _gains(found, raw, about), absent)


def open_exam(train: Split, test: Split, labels: dict[str, frozenset[str]], seed: int) -> Exam:
    """Samples of both splits with labels and all modalities. Raises UserError when there are none, or shared ones."""
    known = tuple(name for name in MODALITIES if test.has[name].any() and train.has[name].any())
    classes = sorted({label for key in train.keys for label in labels.get(key, ())})
    sides = [_labelled(split, known, labels, classes) for split in (train, test)]
    (train_numbers, train_labels), (test_numbers, test_labels) = sides
    shared = set(train.keys) & set(test.keys)
    if shared:
        raise UserError(f"{len(shared)} pictures are in both folders of shards (such as {min(shared)!r}): give others")
    resamples = resample_counts(np.unique(test.groups[test_numbers], return_inverse=True)[1], seed)
    return Exam(
        train, test, train_numbers, test_numbers, train_labels, test_labels, tuple(classes), known, resamples, seed
    )


def probe(task: Task, exam: Exam, subset: tuple[str, ...]) -> Score:
    """The model's features of `subset`, probed."""

    def features(samples: list) -> torch.Tensor:
        return task.system.features(samples, subset)

    name = " + ".join(subset)
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
        (f"gain_over.{name}", MODALITIES, found[name,]) for name in MODALITIES if MODALITIES in found
    ]
    pairs += [
        (f"gain.{'_'.join(more)}_over_{'_'.join(less)}", more, found[less])
        for more, less in product(found, found)
        if set(less) < set(more) and len(less) == len(more) - 1
    ]
    pairs += [(f"gain.{'_'.join(subset)}_over_{BASELINES[subset]}", subset, score) for subset, score in raw.items()]
    return [
        found[more].minus(less).metric(f"classify.{name}", modalities=more, note=note, **about)
        for name, more, less in pairs
    ]


def _labelled(
    split: Split, modalities: tuple[str, ...], labels: dict[str, frozenset[str]], classes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers with labels and all modalities, and their labels (N, C) bool."""
    numbers = np.array([n for n in split.with_all(modalities) if split.keys[n] in labels], np.int64)
    if not len(numbers):
        raise UserError("--labels has nothing for the samples of one of the folders; give the files of both")
    columns = {name: column for column, name in enumerate(classes)}
    table = np.zeros((len(numbers), len(classes)), bool)
    for row, number in enumerate(numbers):
        table[row, [columns[name] for name in labels[split.keys[number]] if name in columns]] = True
    if not table.any():
        raise UserError("the two folders of shards share no class of objects, so nothing can be learned")
    return numbers, table


def fit(features_ND: np.ndarray, labels_NC: np.ndarray, strengths: tuple[float, ...]) -> np.ndarray:
    """Multi-label logistic regression: weights and a last row of biases, (P, D + 1, C) float32, one a strength of L2.

    Minimises mean cross-entropy of each class + strength / 2 x squared weights (biases free) by L-BFGS, full batch.
    """
    inputs, targets = torch.from_numpy(features_ND).float(), torch.from_numpy(labels_NC).float()
    strength_P = torch.tensor(strengths)[:, None, None]
    rate = targets.mean(0).clamp(1e-4, 1 - 1e-4)
    weights = torch.zeros(len(strengths), inputs.shape[1], targets.shape[1], requires_grad=True)
    biases = torch.logit(rate).repeat(len(strengths), 1, 1).requires_grad_()
    optimizer = torch.optim.LBFGS([weights, biases], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits_PNC = inputs @ weights + biases
        entropy = torch.nn.functional.softplus(logits_PNC) - targets * logits_PNC
        total = entropy.mean(1).sum() + (strength_P / 2 * weights.square()).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return torch.cat([weights, biases], dim=1).detach().numpy()


def logits(features_ND: np.ndarray, weights_DC: np.ndarray) -> np.ndarray:
    """(N, C) scores from one of `fit`'s weights."""
    return features_ND @ weights_DC[:-1] + weights_DC[-1]
