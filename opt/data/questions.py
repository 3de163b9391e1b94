"""Questions about pictures: JSON lines beside a folder of shards, read as one sample a question.

    {"image_id": "s1-00000007", "question": "what color is the star?", "answers": ["red"]}
    {"image_ids": ["s1-00000007", "s1-00000003"], "question": "both pictures show a star", "answers": ["true"]}

`answers` holds one entry an annotator and may be absent. `image_id` is the corpus's own; records are found by the key
that extraction made of it. A sample of several ids has the pictures of all their records, in order, as one record of
several pictures has under one id. `set`, where there is one, names the lines of one sentence (NLVR2's consistency).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt.config import UserError
from opt.data.layout import ranges
from opt.data.record import Sample
from opt.data.shards import ShardReader, key_hash
from opt.data.subset import Subset
from opt.files import sha256

NORMALISER = "VQA's: lower-case, no punctuation, articles and apostrophes, number words up to ten as digits"
MARKS = ";/[]\"{}()=+\\_-><@`,?!"
TRUTHS = ("false", "true")
"""Answers to statements (NLVR2)."""
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}


class Question(NamedTuple):
    """One line: the keys of its records, the question and the annotators' answers as written, the set it belongs to."""

    keys: tuple[str, ...]
    text: str
    answers: tuple[str, ...] = ()
    set: str = ""


class Questions(Subset):
    """One sample a question: the pictures of its records, caption = the question, no speech, `answers` filled.

    In the order of the shards, by the first record, whose key is the sample's. answered: leave out questions without an
    answer. `left_out` says in words what the file holds that cannot be used. Raises UserError when nothing is left.
    """

    def __init__(self, whole: ShardReader, path: Path, answered: bool) -> None:
        questions = read_questions(path)
        asked = _Asked(whole, questions)
        useful = asked.seen & np.array([bool(question.answers) or not answered for question in questions])
        reasons = {
            f"ask about pictures that these shards do not hold, such as {asked.unknown!r}": int((~asked.known).sum()),
            "ask about a record without a picture": int((asked.known & ~asked.seen).sum()),
            "have no answer": int((asked.seen & ~useful).sum()),
        }
        said = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        self.left_out = f"of {len(questions):,} questions in {path}, {'; '.join(said)}: left out" if said else ""
        if not useful.any():
            raise UserError(f"{path}: no question can be used with {whole.place}: {'; '.join(said)}")
        order = np.flatnonzero(useful)[np.argsort(asked.first[useful], kind="stable")]
        super().__init__(whole, asked.first[order])
        self.path, self.answered = path, answered
        self.questions = [questions[place] for place in order]
        self.later, self.ends = asked.later(order)

    @property
    def fingerprint(self) -> str:
        """Names shards and questions together."""
        return hashlib.sha256(f"{self.whole.fingerprint} {sha256(self.path)}".encode()).hexdigest()

    def column(self, name: str) -> np.ndarray:
        if name == "words":
            words = [len(re.findall(r"\w+|[^\w\s]", question.text)) for question in self.questions]
            return np.array(words, np.int32)
        whole = self.whole.column(name)
        values = whole[self.numbers]
        if name == "frames":
            return np.zeros_like(values)
        if name in ("regions", "codes", "jpeg_size"):  # of all the pictures
            values = values.astype(np.int32)
            np.add.at(values, np.searchsorted(self.ends, np.arange(len(self.later)), side="right"), whole[self.later])
        return values

    def prefetch(self, numbers: Sequence[int], jpeg: bool = False) -> None:
        later = [other for number in numbers for other in self._later(number)]
        self.whole.prefetch(self.numbers[np.asarray(numbers, np.int64)].tolist() + later, jpeg)

    def sample(self, number: int, jpeg: bool = False) -> Sample:
        question = self.questions[number]
        first = super().sample(number, jpeg)
        later = [self.whole.sample(other, jpeg).pictures for other in self._later(number)]
        return dataclasses.replace(
            first, pictures=sum(later, first.pictures), narration=-1, narration_id="", caption=question.text,
            speech=None, speech_codes=None, answers=question.answers,
        )  # fmt: skip

    def captions(self) -> Iterator[str]:
        return (question.text for question in self.questions)

    def _later(self, number: int) -> list[int]:
        """Numbers of the records after the first that question `number` is about."""
        return self.later[self.ends[number - 1] if number else 0 : self.ends[number]].tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return Questions, (self.whole, self.path, self.answered)


class _Asked:
    """Where the records of questions are in `whole`. Arrays have an entry a question.

    first: number of the first record's first sample. known: all records are there. seen: each of them has a picture.
    """

    def __init__(self, whole: ShardReader, questions: Sequence[Question]) -> None:
        keys, firsts = np.unique(whole.key_hash, return_index=True)
        flat = [key for question in questions for key in question.keys]
        hashes = np.array([key_hash(key) for key in flat], np.uint64)
        places = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
        known, self._numbers = keys[places] == hashes, firsts[places]
        lengths = whole.lengths
        seen = known & (lengths.regions + lengths.codes + lengths.jpegs > 0)[self._numbers]
        self._sizes = np.array([len(question.keys) for question in questions])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.known = np.logical_and.reduceat(known, self._starts)
        self.seen = np.logical_and.reduceat(seen, self._starts)
        self.first = self._numbers[self._starts]
        self.unknown = "" if known.all() else flat[int(np.argmin(known))]

    def later(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the records after the first, of the questions `order` one after another, and where each one's
        end."""
        counts = self._sizes[order] - 1
        return self._numbers[ranges(self._starts[order] + 1, counts)], np.cumsum(counts)


def read_questions(path: Path) -> list[Question]:
    """All lines of the file; empty answers count as none. Raises UserError naming the line that is wrong."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file; expected lines "
                        '{"image_id": ..., "question": ..., "answers": [...]}, or "image_ids": [..., ...]')
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number}: expected {{"image_id": text, "question": text, "answers": [text, ...]}}, '
                    'or "image_ids": [text, text, ...] for "image_id"'
                ) from error
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def _question(entry: Any) -> Question:
    names = entry["image_ids"] if "image_ids" in entry else [entry["image_id"]]
    text, answers, together = entry["question"], entry.get("answers", []), entry.get("set", "")
    if "image_ids" in entry and ("image_id" in entry or not isinstance(names, list) or len(names) < 2):
        raise TypeError("image_ids must be a list of two or more, and stand instead of image_id")
    if any(isinstance(name, bool) or not isinstance(name, str | int) for name in names):
        raise TypeError("an image_id must be a text or a number")
    if not isinstance(text, str) or not text.strip() or not isinstance(together, str):
        raise TypeError("question must be a text, and set as well")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError("answers must be a list of texts")
    "".join([*map(str, names), text, *answers, together]).encode()  # half of a surrogate pair is no text: ValueError
    keys = tuple(re.sub(r"[./\\]", "-", str(name).strip()) for name in names)
    return Question(keys, text, tuple(answer for answer in answers if answer.strip()), together)


def normalise(answer: str) -> str:
    """An answer as VQA's official evaluation compares them; one made of articles or punctuation alone stays as it is.

    A mark goes where it stands beside a space anywhere in the answer, or the answer holds a number such as 1,000; else
    it becomes a space. A period goes unless a digit follows. Signs such as $ % : & stay. Differences: the script has a
    list of contractions to which it adds the apostrophe (dont: don't), here every apostrophe goes; it leaves the
    annotators' answers as they are where all agree, here both sides are always treated alike.
    """
    given = answer.lower().replace("'", "").replace("\u2019", "").strip()
    plain, thousands = given, re.search(r"\d,\d", given)
    for mark in MARKS:
        if mark in plain:
            plain = plain.replace(mark, "" if thousands or f"{mark} " in given or f" {mark}" in given else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [DIGITS.get(word, word) for word in plain.split() if word not in ARTICLES]
    return " ".join(words) or answer.lower().strip()


def frequent_answers(questions: Sequence[Question], size: int) -> tuple[str, ...]:
    """The `size` answers that annotators gave most often, normalised, most frequent first; equals by the alphabet."""
    counts = Counter(normalise(answer) for question in questions for answer in question.answers)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])


def written_answers(questions: Sequence[Question], size: int) -> tuple[str, ...]:
    """As `frequent_answers`, each in the form in which annotators wrote it most often: what a decoder can spell."""
    forms: dict[str, Counter[str]] = {}
    for question in questions:
        for answer in question.answers:
            forms.setdefault(normalise(answer), Counter())[answer.strip()] += 1
    return tuple(min(forms[answer], key=lambda form: (-forms[answer][form], form))
                 for answer in frequent_answers(questions, size))
