"""Linear probe: what can be read off frozen features of every subset of text, image and audio, as mAP.

    train shards --system.features--> (N, D) --logistic regression, L2 by a held-out part--> scores of test shards
                                                                              scores --> mean average precision

All classes of one subset and all strengths of L2 are fitted at once, full batch. Shape legend: N samples, D feature
width, C classes, P strengths, S bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.metrics import interval, mean_average_precision, resample_counts
from eval.naming import read_labels
from eval.result import Metric
from eval.task import EvalConfig, Split, Task, open_split, open_task
from opt.config import UserError
from opt.systems.system import MODALITIES

SUBSETS = tuple(subset for size in (1, 2, 3) for subset in combinations(MODALITIES, size))
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
    task.finish(*measure(task, train, labels))


def measure(task: Task, train: Split, labels: dict[str, frozenset[str]]) -> tuple[list[Metric], dict[str, str]]:
    """mAP of every subset with intervals, gains of all modalities over each one, and what is absent.

    The same samples serve all subsets: those that have every modality the shards know. Raises UserError without labels.
    """
    known = tuple(name for name in MODALITIES if task.split.has[name].any() and train.has[name].any())
    classes = sorted({label for key in train.keys for label in labels.get(key, ())})
    sides = [_labelled(split, known, labels, classes) for split in (train, task.split)]
    (train_numbers, train_labels), (test_numbers, test_labels) = sides
    shared = set(train.keys) & set(task.split.keys)
    if shared:
        raise UserError(f"{len(shared)} pictures are in both folders of shards (such as {min(shared)!r}): give others")
    groups = np.unique(task.split.groups[test_numbers], return_inverse=True)[1]
    weights_SN = resample_counts(groups, task.provenance.seed)
    found: dict[tuple[str, ...], tuple[float, np.ndarray]] = {}
    for subset in SUBSETS:
        if set(subset) <= set(known):
            scores_NC = _probe(task, train, subset, train_numbers, train_labels, test_numbers)
            value = float(mean_average_precision(scores_NC, test_labels))
            found[subset] = value, mean_average_precision(scores_NC, test_labels, weights_SN)
    present = test_labels.any(0)
    about: dict[str, Any] = {
        "n": len(test_numbers),
        "candidates": f"{present.sum()} of {len(classes)} classes occur; {len(train_numbers)} training samples",
        "normaliser": "macro over classes with a positive, step-wise average precision",
    }
    chance = float(test_labels[:, present].mean())
    metrics = [
        Metric(
            f"classify.map.{'_'.join(subset)}", value, interval=interval(draws, value), chance=chance,
            chance_method="share of positives", modalities=subset, **about,
        )
        for subset, (value, draws) in found.items()
    ]  # fmt: skip
    absent = {f"classify.map.{'_'.join(subset)}": f"the shards lack {', '.join(sorted(set(subset) - set(known)))}"
              for subset in SUBSETS if subset not in found}  # fmt: skip
    return metrics + _gains(found, about), absent


def _gains(found: dict[tuple[str, ...], tuple[float, np.ndarray]], about: dict[str, Any]) -> list[Metric]:
    """All modalities minus each one alone, with intervals of the paired difference over the same resamples."""
    if MODALITIES not in found:
        return []
    all_value, all_draws = found[MODALITIES]
    lone = {name: found[name,] for name in MODALITIES}
    return [
        Metric(
            f"classify.gain_over.{name}",
            all_value - value,
            interval=interval(all_draws - draws, all_value - value),
            modalities=MODALITIES,
            note="paired difference of mAP over the same resamples",
            **about,
        )
        for name, (value, draws) in lone.items()
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


def _probe(
    task: Task, train: Split, subset: tuple[str, ...], train_numbers: np.ndarray, labels: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Scores (N, C) of the test samples by the probe with the strength of L2 that does best on held-out pictures."""

    def features(samples: list) -> torch.Tensor:
        return task.system.features(samples, subset)

    name = " + ".join(subset)
    fitted = task.tensor(train_numbers, features, f"features of {name}, training", train)
    judged = task.tensor(test, features, f"features of {name}")
    mean, spread = fitted.mean(0), fitted.std(0) + 1e-5
    fitted, judged = (fitted - mean) / spread, (judged - mean) / spread
    pictures = np.random.default_rng(task.provenance.seed).random(train.groups.max() + 1)
    held = pictures[train.groups[train_numbers]] < HELD_OUT_SHARE
    tried = fit(fitted[~held], labels[~held], STRENGTHS)
    judgements = [float(mean_average_precision(logits(fitted[held], one), labels[held])) for one in tried]
    best = STRENGTHS[int(np.argmax(judgements))]
    return logits(judged, fit(fitted, labels, (best,))[0])


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
