"""Statements about two pictures, told true from false by a model tuned for them, by NLVR2's two measures.

    sentence + left picture + right picture --system.answer--> true | false --> accuracy over pairs
                                                                            --> consistency over sentences

Consistency (Suhr et al., arXiv 1811.00491, section 6): the share of sentences all of whose pairs of pictures are judged
right. Pairs belong together by their line's `set`, and by the words of the sentence where there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.asked import Asked, answered, example, open_asked, question
from eval.result import Findings, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task
from opt.config import UserError
from opt.data.questions import NORMALISER, TRUTHS, normalise


@dataclass
class NLVR2Config(EvalConfig):
    """Options of `opt eval nlvr2`."""

    statements: Path | None = None
    """Lines {"image_ids": [left, right], "question": sentence, "answers": ["true" or "false"], "set": the
    sentence's name}, the last one optional; needed."""


def nlvr2(config: NLVR2Config) -> None:
    """Tell true sentences about two pictures from false ones, with a model that `opt finetune nlvr2` tuned for that.

    Beside the result: nlvr2_answers.jsonl, every verdict.

    Example: opt eval nlvr2 runs/nlvr2/model runs/demo/shards/test --statements runs/demo/scenes/test_statements.jsonl
    """
    if config.statements is None:
        raise UserError("--statements is missing: give the file of sentences about pairs of pictures of these shards")
    task = open_asked("nlvr2", config, config.statements)
    task.finish(measure(task))


def measure(task: Task) -> Findings:
    """Accuracy and consistency, the first statements, and the sentences that were judged wrong most often.

    Raises UserError where an answer is neither true nor false, or two answers are both.
    """
    asked = answered(task, task.system.answer, "judge statements")
    judged = np.array([bool(sample.answers) for sample in asked.samples])
    if not judged.any():
        return Findings([], dict.fromkeys(("nlvr2.accuracy", "nlvr2.consistency"), "no statement has an answer"))
    numbers = np.flatnonzero(judged).tolist()
    truth = np.array([_truth(asked.samples[number].answers, asked.lines[number]) for number in numbers])
    said = np.array([normalise(asked.answers[number]) for number in numbers])
    right, sets = said == truth, _sets(task, asked, numbers)
    majority = Counter(truth.tolist()).most_common(1)[0][0]
    guessed = truth == majority
    whole, whole_guessed = (np.bincount(sets, weights=~each) == 0 for each in (right, guessed))
    about: dict[str, Any] = {
        "chance_method": f"always {majority!r}, the most frequent answer",
        "modalities": ("text", "image"), "direction": "sentence + two images -> true or false",
        "normaliser": NORMALISER, "note": task.system.answering,
    }  # fmt: skip
    seed, count = task.provenance.seed, len(whole)
    metrics = [
        measured("nlvr2.accuracy", right.astype(float), seed, groups=sets, chance=float(guessed.mean()),
                 protocol="nlvr2/accuracy", candidates=f"true or false; {count} sentences", **about),
        measured("nlvr2.consistency", whole.astype(float), seed, chance=float(whole_guessed.mean()),
                 protocol="nlvr2/consistency",
                 candidates=f"{count} sentences with {len(sets) / count:.1f} pairs of pictures each", **about),
    ]  # fmt: skip
    examples = [example(task, asked, number) for number in range(min(EXAMPLES, len(asked.samples)))]
    return Findings(metrics, {}, examples, _worst(task, asked, numbers, right, sets))


def _truth(answers: Sequence[str], line: Mapping[str, Any]) -> str:
    for answer in answers:
        if normalise(answer) not in TRUTHS:
            raise UserError(f"the statement {line['question']!r:.80} is answered by {answer!r:.40}, not true or false; "
                            "`opt eval vqa` takes questions with other answers")
    if len(given := {normalise(answer) for answer in answers}) > 1:
        raise UserError(f"the statement {line['question']!r:.80} is answered by both true and false; give one answer")
    return given.pop()


def _sets(task: Task, asked: Asked, numbers: list[int]) -> np.ndarray:
    """Number of the sentence that each of the samples `numbers` belongs to, int64 (N,) from 0."""
    names = []
    for number in numbers:
        line = question(task, number)
        names.append((line.set if line else "") or str(asked.lines[number]["question"]))
    return np.unique(names, return_inverse=True)[1]


def _worst(
    task: Task, asked: Asked, numbers: list[int], right: np.ndarray, sets: np.ndarray
) -> list[dict[str, Any]]:
    """The first wrong pair of each of the sentences that were judged wrong most often."""
    wrong, pairs = np.bincount(sets, weights=~right).astype(int), np.bincount(sets)
    order = [each for each in np.argsort(-wrong / pairs, kind="stable") if wrong[each]][:WORST]
    return [
        example(task, asked, numbers[np.flatnonzero((sets == each) & ~right)[0]],
                failure=f"{wrong[each]} of the sentence's {pairs[each]} pairs judged wrong")
        for each in order
    ]  # fmt: skip
