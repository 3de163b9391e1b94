"""What a model is fine-tuned for: its task, and the list of answers that questions are answered from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opt.config import UserError
from opt.data.questions import normalise
from opt.data.record import Sample

AGREEMENT = 0.3
"""What each of several annotators adds to the score of an answer, up to 1 (VQA, as UNITER has it)."""

Downstream = Literal[
    "pretraining", "captioning", "retrieval-margin", "retrieval-in-batch", "retrieval-hard", "vqa-classes", "vqa-words",
    "nlvr2",
]


@dataclass(frozen=True)
class Tuning:
    """What a model was fine-tuned for; `opt finetune` sets it, and the preparer follows it."""

    task: Downstream = "pretraining"
    given: tuple[str, ...] = ("image",)
    """What captions are written from."""
    margin: float = 0.2
    """How much likelier a true pair must be than a false one (gap A18)."""
    answers: tuple[str, ...] = ()
    """The list that questions are answered from (gap A22)."""
    pictures: int = 1
    """How many pictures those questions are about: the answer head reads as many pooled states side by side."""

    @property
    def about(self) -> int:
        """How many pictures a question of the task is about."""
        return 2 if self.task == "nlvr2" else 1

    def scores(self, answers: Sequence[str]) -> dict[int, float]:
        """How right each answer of the list is, by its place: 1 for a single annotator's, else by how many agree."""
        counts = Counter(map(normalise, answers))
        rightness = {answer: 1.0 if len(answers) == 1 else min(AGREEMENT * counts[answer], 1.0) for answer in counts}
        return {place: rightness[answer] for place, answer in enumerate(self.answers) if answer in rightness}

    def require(self, sample: Sample) -> None:
        """Raises UserError for a question about more or fewer pictures than those of the task."""
        if len(sample.pictures) != self.about:
            raise UserError(
                f"the question {sample.caption!r:.80} about {sample.key!r} has {_pictures(len(sample.pictures))}; a "
                f"model tuned for {self.task} answers questions about {_pictures(self.about)}: `opt finetune nlvr2` "
                "tunes for two pictures, vqa-classes and vqa-words for one"
            )


def _pictures(count: int) -> str:
    return f"{count} picture{'s' * (count != 1)}"
