"""A linear probe: samples to fit on and others to be judged on, L2 chosen on a held-out part, scores to mAP.

    two splits + labels --open_exam--> Exam --probe(features)--> logistic regression --> Score: mAP and its resamples

All classes and all strengths of L2 are fitted at once, full batch. Shape legend: N samples, D feature width, C classes,
P strengths, S bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.labelled import Score, Truth, table
from eval.metrics import mean_average_precision, resample_counts
from eval.task import Split
from opt.config import UserError
from opt.systems.system import MODALITIES

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT_SHARE = 0.2
STEPS = 400


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
    train_verified: np.ndarray | None = None
    test_verified: np.ndarray | None = None
    """(N, C) bool: labels that count for a sample; None: all."""

    @property
    def truth(self) -> Truth:
        """What is true of the test samples: judges scores."""
        return Truth(self.test_labels, self.test_verified, self.resamples)

    def judge(self, scores_NC: np.ndarray) -> Score:
        """Macro mAP of scores for the test samples, on the same resamples of pictures each time."""
        return self.truth.judge(scores_NC)

    @property
    def held_out(self) -> np.ndarray:
        """Training samples that settings are chosen on, those of every fifth picture or so: bool (N,)."""
        pictures = np.random.default_rng(self.seed).random(self.train.groups.max() + 1)
        return pictures[self.train.groups[self.train_numbers]] < HELD_OUT_SHARE

    def probe(self, fitted_ND: np.ndarray, judged_ND: np.ndarray) -> Score:
        """Fit on features of the training samples and judge those of the test samples.

        The strength of L2 is the one that does best on a held-out part of the training pictures.
        """
        mean, spread = fitted_ND.mean(0), fitted_ND.std(0) + 1e-5
        fitted_ND, judged_ND = (fitted_ND - mean) / spread, (judged_ND - mean) / spread
        held = self.held_out
        labels, verified = self.train_labels, self.train_verified
        within, without = (None if verified is None else verified[part] for part in (held, ~held))
        tried = fit(fitted_ND[~held], labels[~held], STRENGTHS, without)
        judgements = [mean_average_precision(logits(fitted_ND[held], one), labels[held], None, within) for one in tried]
        best = STRENGTHS[int(np.argmax(judgements))]
        return self.judge(logits(judged_ND, fit(fitted_ND, labels, (best,), verified)[0]))

    def about(self) -> dict[str, Any]:
        """The protocol, for metrics: policy of labels and number of classes."""
        present = self.test_labels.any(0).sum()
        return {
            "n": len(self.test_numbers),
            "candidates": f"{present} of {len(self.classes)} classes occur; {self.truth.policy}; "
                          f"{len(self.train_numbers)} training samples",
            "normaliser": "step-wise average precision, equal scores together",
        }  # fmt: skip


def open_exam(
    train: Split, test: Split, labels: dict[str, frozenset[str]], seed: int,
    absent: dict[str, frozenset[str]] | None = None,
) -> Exam:
    """Samples of both splits with labels and all modalities. Raises UserError when there are none, or shared ones.

    absent: by key, the labels that are verified not to be there; where there are any, only verified ones count.
    """
    known = tuple(name for name in MODALITIES if test.has[name].any() and train.has[name].any())
    classes = sorted({label for key in train.keys for label in labels.get(key, ())})
    sides = [_labelled(split, known, labels, classes) for split in (train, test)]
    (train_numbers, train_labels), (test_numbers, test_labels) = sides
    shared = set(train.keys) & set(test.keys)
    if shared:
        raise UserError(f"{len(shared)} pictures are in both folders of shards (such as {min(shared)!r}): give others")
    resamples = resample_counts(np.unique(test.groups[test_numbers], return_inverse=True)[1], seed)
    verified = (there | table([split.keys[number] for number in numbers], classes, absent) if absent else None
                for split, numbers, there in (
                    (train, train_numbers, train_labels), (test, test_numbers, test_labels)))  # fmt: skip
    return Exam(
        train, test, train_numbers, test_numbers, train_labels, test_labels, tuple(classes), known, resamples, seed,
        *verified,
    )  # fmt: skip


def _labelled(
    split: Split, modalities: tuple[str, ...], labels: dict[str, frozenset[str]], classes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers with labels and all modalities, and their labels (N, C) bool."""
    numbers = np.array([n for n in split.with_all(modalities) if split.keys[n] in labels], np.int64)
    if not len(numbers):
        raise UserError("--labels has nothing for the samples of one of the folders; give the files of both")
    labels_NC = table([split.keys[number] for number in numbers], classes, labels)
    if not labels_NC.any():
        raise UserError("the two folders of shards share no class of objects, so nothing can be learned")
    return numbers, labels_NC


def fit(
    features_ND: np.ndarray, labels_NC: np.ndarray, strengths: tuple[float, ...], verified_NC: np.ndarray | None = None
) -> np.ndarray:
    """Multi-label logistic regression: weights and a last row of biases, (P, D + 1, C) float32, one a strength of L2.

    Minimises mean cross-entropy of each class + strength / 2 x squared weights (biases free) by L-BFGS, full batch.
    verified_NC bool: samples that count for a class; None: all for all.
    """
    inputs, targets = torch.from_numpy(features_ND).float(), torch.from_numpy(labels_NC).float()
    strength_P = torch.tensor(strengths)[:, None, None]
    counts = torch.ones_like(targets) if verified_NC is None else torch.from_numpy(verified_NC).float()
    shares = counts / counts.sum(0).clamp(min=1)  # of each sample in the mean of a class
    rate = (targets * shares).sum(0).clamp(1e-4, 1 - 1e-4)
    weights = torch.zeros(len(strengths), inputs.shape[1], targets.shape[1], requires_grad=True)
    biases = torch.logit(rate).repeat(len(strengths), 1, 1).requires_grad_()
    optimizer = torch.optim.LBFGS([weights, biases], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits_PNC = inputs @ weights + biases
        entropy = torch.nn.functional.softplus(logits_PNC) - targets * logits_PNC
        total = (entropy * shares).sum() + (strength_P / 2 * weights.square()).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return torch.cat([weights, biases], dim=1).detach().numpy()


def logits(features_ND: np.ndarray, weights_DC: np.ndarray) -> np.ndarray:
    """(N, C) scores from one of `fit`'s weights."""
    return features_ND @ weights_DC[:-1] + weights_DC[-1]
