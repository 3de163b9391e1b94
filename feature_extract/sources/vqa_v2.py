"""VQA v2: questions about COCO's pictures. The rows are the pictures, without narrations; the questions go beside them.

    v2_OpenEnded_mscoco_train2014_questions.json    {"questions": [{"question_id", "image_id", "question"}]}
    v2_mscoco_train2014_annotations.json            {"annotations": [{"question_id", "answers": [{"answer"}] * 10}]}
    train2014/COCO_train2014_000000000009.jpg

Goyal et al., arXiv 1612.00837. The test splits (test2015, test-dev2015) have no annotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from feature_extract.sources.item import BadRow, Item
from feature_extract.sources.reading import (
    MALFORMED,
    bad_row,
    field,
    identifier,
    join,
    key_of,
    load_json,
    split_file,
)


@dataclass(frozen=True)
class Source:
    """VQA v2: v2_OpenEnded_mscoco_SPLIT_questions.json, v2_mscoco_SPLIT_annotations.json, and the folder SPLIT."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    split: str = "train"
    """Such as train2014, val2014, test2015; train and val alone will do."""
    pictures: str = ""
    """Folder of the split's pictures, or a URL; by default the one named like the split."""

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        questions, split = self._questions()
        annotations = self._annotations(split)
        return [questions, annotations] if annotations.is_file() else [questions]

    def rows(self) -> Iterator[Item | BadRow]:
        path, split = self._questions()
        split = split.replace("test-dev", "test")  # a part of the test split's questions, about its pictures
        folder, seen = self.pictures or split, set[str]()
        for number, entry in enumerate(load_json(path, "questions")["questions"]):
            try:
                image_id = identifier(entry, "image_id")
                field(entry, "question", str)
                if image_id not in seen:
                    yield Item(key_of(image_id), (join(folder, f"COCO_{split}_{image_id:0>12}.jpg"),))
                seen.add(image_id)
            except MALFORMED as error:
                yield bad_row(f"{path.name}:questions[{number}]", error)

    def questions(self) -> Iterator[dict[str, Any]]:
        """All questions in order, with the ten annotators' answers; without answers where there are no annotations.

        A malformed question is left out: `rows` has named it.
        """
        path, split = self._questions()
        answers = _answers(self._annotations(split))
        for entry in load_json(path, "questions")["questions"]:
            try:
                key, question = key_of(identifier(entry, "image_id")), field(entry, "question", str)
                given = answers.get(identifier(entry, "question_id"), [])
            except MALFORMED:
                continue
            if question.strip():
                yield {"image_id": key, "question": question, "answers": given}

    def _questions(self) -> tuple[Path, str]:
        return split_file(self.corpus, "v2_OpenEnded_mscoco_{}_questions.json", self.split)

    def _annotations(self, split: str) -> Path:
        return self.corpus / f"v2_mscoco_{split}_annotations.json"


def _answers(path: Path) -> dict[str, list[str]]:
    """The answers to every question_id; none where there is no such file, or of an annotation that is malformed."""
    answers = {}
    for entry in load_json(path, "annotations")["annotations"] if path.is_file() else []:
        try:
            given = [field(answer, "answer", str) for answer in field(entry, "answers", list)]
            answers[identifier(entry, "question_id")] = given
        except MALFORMED:
            continue  # the question stays, without answers
    return answers
