"""Questions as the split of an evaluation: opened beside shards, answered, and kept with their pictures.

    MODEL, SHARDS + lines of questions --open_asked--> Task --answered--> Asked -> TASK_answers.jsonl
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.provenance import narrowed
from eval.task import EvalConfig, Split, Task, open_task
from opt.data.questions import Question, Questions
from opt.data.record import Sample
from opt.files import write_atomic


@dataclass(frozen=True)
class Asked:
    """What was asked and answered, an entry a question each."""

    samples: Sequence[Sample]
    answers: Sequence[str]
    lines: Sequence[dict[str, Any]]
    """{"image_id" or "image_ids", "question", "answer", "answers"} by the records' keys."""


def open_asked(name: str, config: EvalConfig, questions: Path) -> Task:
    """As `open_task`; the split is the questions of a file about the shards' pictures. Says what it leaves out."""
    task = open_task(name, name, config)
    reader = Questions(task.split.reader, questions, answered=False)
    if reader.left_out:
        print(reader.left_out)
    split = Split(reader, config.limit, task.split.reading)
    provenance = dataclasses.replace(narrowed(task.provenance, split.keys), split_sha256=reader.fingerprint)
    return dataclasses.replace(task, split=split, provenance=provenance)


def answered(task: Task, answer: Callable[[list[Sample]], list[str]], label: str) -> Asked:
    """All samples of the task's split answered; `TASK_answers.jsonl` among the results holds every line."""
    answers = task.batches(np.arange(len(task.split)), answer, label)
    samples = [_without_features(task.split.sample(number)) for number in range(len(task.split))]
    lines = [{**_about(keys_of(task, number)), "question": sample.caption, "answer": said, "answers": sample.answers}
             for number, (sample, said) in enumerate(zip(samples, answers, strict=True))]
    task.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(task.folder / f"{task.name}_answers.jsonl",
                 "".join(json.dumps(line) + "\n" for line in lines).encode())  # fmt: skip
    return Asked(samples, answers, lines)


def question(task: Task, number: int) -> Question | None:
    """The line that a sample was made of; None for a split of another kind."""
    reader = task.split.reader
    return reader.questions[number] if isinstance(reader, Questions) else None


def keys_of(task: Task, number: int) -> tuple[str, ...]:
    """Keys of the records that a question is about."""
    asked = question(task, number)
    return asked.keys if asked else (task.split.keys[number],)


def example(task: Task, asked: Asked, number: int, **more: Any) -> dict[str, Any]:
    """A question for the report, with its pictures copied to the results."""
    paths = keep_pictures(task, number)
    shown = {"pictures": paths} if len(paths) > 1 else {"picture": paths[0] if paths else None}
    return {**asked.lines[number], **shown, "key": task.split.keys[number], **more}


def keep_pictures(task: Task, number: int) -> list[str]:
    """Copy the jpegs of a question's pictures to the results; their paths there, in order."""
    pictures, keys = task.split.sample(number, jpeg=True).pictures, keys_of(task, number)
    names = keys if len(keys) == len(pictures) else [f"{keys[0]}.{place}" for place in range(len(pictures))]
    paths = []
    for name, picture in zip(names, pictures, strict=True):
        if picture.jpeg is not None:
            path = task.folder / "pictures" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, picture.jpeg)
            paths.append(str(path.relative_to(task.folder)))
    return paths


def _about(keys: tuple[str, ...]) -> dict[str, Any]:
    return {"image_ids": list(keys)} if len(keys) > 1 else {"image_id": keys[0]}


def _without_features(sample: Sample) -> Sample:
    return dataclasses.replace(sample, pictures=(), speech=None)
