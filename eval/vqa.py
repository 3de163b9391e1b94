"""Questions about pictures, answered by a model tuned for them, by VQA's measure.

    question + picture --system.answer--> answer --normalised--> how many annotators agree --> accuracy
                                                             \\--> answers.jsonl: every answer

Accuracy of an answer (VQA, arXiv 1505.00468): it counts in full when three annotators gave it, min(agreeing / 3, 1),
averaged over leaving each of the annotators out; with fewer than four annotators all the others must agree, and with
one this is an exact match.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, EvalConfig, Split, Task, open_task
from opt.config import UserError
from opt.data.questions import NORMALISER, Questions, normalise
from opt.files import write_atomic

AGREEING = 3
KINDS = ("yes_no", "number", "other")


@dataclass
class VQAConfig(EvalConfig):
    """Options of `opt eval vqa`."""

    questions: Path | None = None
    """Lines {"image_id": ..., "question": ..., "answers": [...]} about the pictures of the shards; needed."""


def vqa(config: VQAConfig) -> None:
    """Answer questions about pictures, with a model that `opt finetune` tuned for them: VQA accuracy.

    Example: opt eval vqa runs/vqa/model runs/demo/shards/test --questions runs/demo/scenes/test_questions.jsonl
    """
    if config.questions is None:
        raise UserError("--questions is missing: give the file of questions about the pictures of these shards")
    task = open_task("vqa", "vqa", config)
    reader = Questions(task.split.reader, config.questions, answered=False)
    if reader.left_out:
        print(reader.left_out)
    split = Split(reader, config.limit)
    provenance = dataclasses.replace(task.provenance, split_sha256=reader.fingerprint, samples=len(split))
    task = dataclasses.replace(task, split=split, provenance=provenance)
    task.finish(measure(task))


def measure(task: Task) -> Findings:
    """Metrics, absent ones with reasons, and examples; writes every answer to `answers.jsonl`."""
    numbers = np.arange(len(task.split))
    answers = task.batches(numbers, task.system.answer, "answer questions")
    asked = [task.split.sample(number) for number in range(len(task.split))]
    lines = [{"image_id": sample.key, "question": sample.caption, "answer": answer, "answers": sample.answers}
             for sample, answer in zip(asked, answers, strict=True)]
    task.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(task.folder / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    metrics, absent = [], {}
    given = [sample.answers for sample in asked]
    kinds = np.array([kind(answered) if answered else "" for answered in given])
    for name in ("", *KINDS):
        chosen = np.flatnonzero(kinds == name if name else kinds != "")
        if len(chosen):
            metrics.append(_accuracy(task, name, chosen, answers, given))
        else:
            absent[_name(name)] = "the file holds no such question with an answer"
    examples = [{**lines[number], "picture": task.keep_picture(number), "key": asked[number].key}
                for number in range(min(EXAMPLES, len(lines)))]
    return Findings(metrics, absent, examples)


def accuracy(answer: str, annotators: Sequence[str]) -> float:
    """VQA accuracy of an answer, in [0, 1], against the answers of one or more annotators, all normalised."""
    others = len(annotators) - 1
    agrees = [normalise(given) == normalise(answer) for given in annotators]
    agree = sum(agrees)
    if others == 0:
        return float(agree)
    enough = min(AGREEING, others)
    without_one = [min((agree - own) / enough, 1.0) for own in agrees]
    return sum(without_one) / len(annotators)


def kind(annotators: Sequence[str]) -> str:
    """VQA's kind of question, by the most frequent answer: yes_no, number or other."""
    answer = Counter(map(normalise, annotators)).most_common(1)[0][0]
    return "yes_no" if answer in ("yes", "no") else "number" if answer[:1].isdigit() else "other"


def _accuracy(
    task: Task, name: str, chosen: np.ndarray, answers: Sequence[str], given: Sequence[tuple[str, ...]]
) -> Metric:
    """Of the questions `chosen`, against always giving the answer that annotators gave most often to them."""
    guess = Counter(normalise(answer) for number in chosen for answer in given[number]).most_common(1)[0][0]
    return measured(
        _name(name),
        np.array([accuracy(answers[number], given[number]) for number in chosen]),
        task.provenance.seed,
        groups=task.split.groups[chosen],
        chance=float(np.mean([accuracy(guess, given[number]) for number in chosen])),
        chance_method=f"always {guess!r}, the most frequent answer",
        modalities=("text", "image"),
        direction="question + image -> answer",
        normaliser=NORMALISER,
    )


def _name(kind: str) -> str:
    return f"vqa.accuracy.{kind}" if kind else "vqa.accuracy"
