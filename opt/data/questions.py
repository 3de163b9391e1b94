"""Questions about pictures: JSON lines beside a folder of shards, read as one sample a question.

    {"image_id": "s1-00000007", "question": "what color is the star?", "answers": ["red"]}

`answers` holds one entry an annotator and may be absent. `image_id` is the corpus's own; records are found by the key
that extraction made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt.config import UserError
from opt.data.record import Sample
from opt.data.shards import ShardReader, key_hash
from opt.data.subset import Subset
from opt.files import sha256

NORMALISER = "lower-case, no punctuation but within numbers, no articles, number words up to ten as digits"
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}


@dataclass(frozen=True)
class Question:
    """One line: the record's key, the question and the annotators' answers as written."""

    key: str
    text: str
    answers: tuple[str, ...] = ()


class Questions(Subset):
    """One sample a question: the record's picture, caption = the question, no speech, `answers` filled.

    In the order of the shards. answered: leave out questions without an answer. `left_out` says in words what the file
    holds that cannot be used. Raises UserError when nothing is left.
    """

    def __init__(self, whole: ShardReader, path: Path, answered: bool) -> None:
        questions = read_questions(path)
        keys, firsts = np.unique(whole.key_hash, return_index=True)
        hashes = np.array([key_hash(question.key) for question in questions], np.uint64)
        places = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
        known = keys[places] == hashes
        lengths = whole.lengths
        numbers = firsts[places]
        seen = known & (lengths.regions + lengths.codes > 0)[numbers]
        useful = seen & np.array([bool(question.answers) or not answered for question in questions])
        unknown = next((question.key for question, there in zip(questions, known, strict=True) if not there), "")
        reasons = {
            f"ask about pictures that these shards do not hold, such as {unknown!r}": int((~known).sum()),
            "ask about a record without a picture": int((known & ~seen).sum()),
            "have no answer": int((seen & ~useful).sum()),
        }
        said = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        self.left_out = f"of {len(questions):,} questions in {path}, {'; '.join(said)}: left out" if said else ""
        if not useful.any():
            raise UserError(f"{path}: no question can be used with {whole.place}: {'; '.join(said)}")
        order = np.flatnonzero(useful)[np.argsort(numbers[useful], kind="stable")]
        super().__init__(whole, numbers[order])
        self.path, self.answered = path, answered
        self.questions = [questions[place] for place in order]

    @property
    def fingerprint(self) -> str:
        """Names shards and questions together."""
        return hashlib.sha256(f"{self.whole.fingerprint} {sha256(self.path)}".encode()).hexdigest()

    def column(self, name: str) -> np.ndarray:
        values = super().column(name)
        if name == "words":
            words = [len(re.findall(r"\w+|[^\w\s]", question.text)) for question in self.questions]
            return np.array(words, np.int32)
        return np.zeros_like(values) if name == "frames" else values

    def sample(self, number: int, jpeg: bool = False) -> Sample:
        question = self.questions[number]
        return dataclasses.replace(
            super().sample(number, jpeg), narration=-1, narration_id="", caption=question.text, speech=None,
            answers=question.answers,
        )

    def captions(self) -> Iterator[str]:
        return (question.text for question in self.questions)

    def __reduce__(self) -> tuple[Any, ...]:
        return Questions, (self.whole, self.path, self.answered)


def read_questions(path: Path) -> list[Question]:
    """All lines of the file; empty answers count as none. Raises UserError naming the line that is wrong."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file; expected lines "
                        '{"image_id": ..., "question": ..., "answers": [...]}')
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number}: expected {{"image_id": text, "question": text, "answers": [text, ...]}}'
                ) from error
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def _question(entry: Any) -> Question:
    name, text, answers = entry["image_id"], entry["question"], entry.get("answers", [])
    if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str) or not text.strip():
        raise TypeError("image_id must be a text or a number, question a text")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError("answers must be a list of texts")
    "".join([str(name), text, *answers]).encode()  # half of a surrogate pair is no text: ValueError
    key = re.sub(r"[./\\]", "-", str(name).strip())
    return Question(key, text, tuple(answer for answer in answers if answer.strip()))


def normalise(answer: str) -> str:
    """An answer as VQA compares them: see NORMALISER. One made of articles or punctuation alone stays as it is."""
    plain = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", answer.lower().replace("'", ""))
    words = [DIGITS.get(word, word) for word in plain.split() if word not in ARTICLES]
    return " ".join(words) or answer.lower().strip()


def frequent_answers(questions: Sequence[Question], size: int) -> tuple[str, ...]:
    """The `size` answers that annotators gave most often, normalised, most frequent first; equals by the alphabet."""
    counts = Counter(normalise(answer) for question in questions for answer in question.answers)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])
