"""Questions about pictures, answered by a model tuned for them, by VQA's measure.

    question + picture --system.answer--> answer --normalised--> how many annotators agree --> accuracy
                                                             \\--> vqa_answers.jsonl: every answer

A model answers as it was tuned: by class, in words, or, one tuned for words, by the likeliest of given candidates.

Accuracy of an answer (VQA, arXiv 1505.00468): it counts in full when three annotators gave it, min(agreeing / 3, 1),
averaged over leaving each of the annotators out. Differences from the official script, which has ten annotators for
every question: with fewer than four annotators all the others must agree, and with one this is an exact match; see
`opt.data.questions.normalise` for the words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.asked import Asked, answered, example, open_asked
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task
from opt.config import UserError
from opt.data.questions import NORMALISER, normalise, read_questions, written_answers

AGREEING = 3
CANDIDATES, SHORTLIST = 3129, 128
"""Answers that are ranked, and those of them that are scored in full, where nothing else is asked for."""
KINDS = ("yes_no", "number", "other")


@dataclass
class VQAConfig(EvalConfig):
    """Options of `opt eval vqa`."""

    questions: Path | None = None
    """Lines {"image_id": ..., "question": ..., "answers": [...]} about the pictures of the shards; needed."""
    rank_answers_of: Path | None = None
    """Rank answers by the decoder's likelihood instead of writing one (models tuned for vqa-words): the most frequent
    answers of this file of questions, such as those of training."""
    candidates: int | None = None
    """How many of them are ranked; by default 3129."""
    shortlist: int | None = None
    """Of more candidates than this, only those whose first token is likeliest are scored in full (ALBEF); 0: all; by
    default 128."""


@dataclass(frozen=True)
class Ranked:
    """Candidates that are ranked, and how many of them in full."""

    candidates: tuple[str, ...]
    shortlist: int

    @property
    def protocol(self) -> str:
        """In words, for the note beside a figure."""
        first = f", of which {self.shortlist} by their first token" * (0 < self.shortlist < len(self.candidates))
        return (f"the likeliest of {len(self.candidates):,} candidates{first}: sum of the log-probabilities of tokens "
                "and end, not divided by the length")


def vqa(config: VQAConfig) -> None:
    """Answer questions about pictures, with a model that `opt finetune` tuned for them: VQA accuracy.

    A model tuned for vqa-classes answers from its list, one for vqa-words in words, or with --rank-answers-of by the
    likeliest of given answers. Beside the result: vqa_answers.jsonl, every answer.

    Example: opt eval vqa runs/vqa/model runs/demo/shards/test --questions runs/demo/scenes/test_questions.jsonl
    """
    if config.questions is None:
        raise UserError("--questions is missing: give the file of questions about the pictures of these shards")
    ranked = _ranked(config)
    task = open_asked("vqa", config, config.questions)
    task.finish(measure(task, ranked))


def _ranked(config: VQAConfig) -> Ranked | None:
    """What is ranked, if anything. Raises UserError for options out of range, or that nobody would read."""
    for name, least in (("candidates", 1), ("shortlist", 0)):
        value = getattr(config, name)
        if value is not None and config.rank_answers_of is None:
            raise UserError(f"--{name} is for answers that are ranked: give --rank-answers-of, or leave it out")
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if config.rank_answers_of is None:
        return None
    count = CANDIDATES if config.candidates is None else config.candidates
    known = written_answers(read_questions(config.rank_answers_of), count)
    if not known:
        raise UserError(f"--rank-answers-of {config.rank_answers_of}: no question there has an answer to rank")
    return Ranked(known, SHORTLIST if config.shortlist is None else config.shortlist)


def measure(task: Task, ranked: Ranked | None = None) -> Findings:
    """Metrics, absent ones with reasons, and examples; writes every answer to `vqa_answers.jsonl`."""
    answer = task.system.answer
    if ranked is not None:
        answer = partial(answer, candidates=ranked.candidates, shortlist=ranked.shortlist)
    asked = answered(task, answer, "answer questions")
    given = [sample.answers for sample in asked.samples]
    kinds = np.array([kind(answers) if answers else "" for answers in given])
    how = ranked.protocol if ranked else task.system.answering
    metrics, absent = [], {}
    for name in ("", *KINDS):
        chosen = np.flatnonzero(kinds == name if name else kinds != "")
        if len(chosen):
            metrics.append(_accuracy(task, name, chosen, asked.answers, given, how))
        else:
            absent[_name(name)] = "the file holds no such question with an answer"
    examples = [example(task, asked, number) for number in range(min(EXAMPLES, len(given)))]
    return Findings(metrics, absent, examples, _worst(task, asked))


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
    task: Task, name: str, chosen: np.ndarray, answers: Sequence[str], given: Sequence[tuple[str, ...]], how: str
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
        protocol="vqa/soft",
        normaliser=NORMALISER,
        note=how,
    )


def _worst(task: Task, asked: Asked) -> list[dict[str, Any]]:
    """The worst answers, one a picture; of equally bad ones those that more annotators contradict come first."""
    both = enumerate(zip(asked.samples, asked.answers, strict=True))
    scored = [(accuracy(answer, sample.answers), -len(sample.answers), number)
              for number, (sample, answer) in both if sample.answers]
    worst: list[dict[str, Any]] = []
    seen = set[str]()
    for score, _, number in sorted(scored):
        key = task.split.keys[number]
        if score < 1 and key not in seen and len(worst) < WORST:
            seen.add(key)
            right = Counter(asked.samples[number].answers).most_common(1)[0][0]
            agree = "right is" if score == 0 else f"counts {score:.0%}, most said"
            worst.append(example(task, asked, number, failure=f"said {asked.answers[number]!r}, {agree} {right!r}"))
    return worst


def _name(kind: str) -> str:
    return f"vqa.accuracy.{kind}" if kind else "vqa.accuracy"
