"""Questions about pictures, for any system that fuses a text with a picture: answered from a list (VQA), or about two
pictures (NLVR2).

    question, its pictures --AskedRows--> Batch.parts "text", "image" --unfused--> States --pooled--> (Q, pictures, W)
    pictures side by side --answer head--> how right each answer of the list is (UNITER's and ViLT's way)

Shape legend: Q questions, A answers, P pairs of a question and one of its pictures, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from opt.config import UserError
from opt.data.batch import Batch, Targets
from opt.data.pack import Packer
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.nn.heads import AnswerHead
from opt.objectives.matching import soft_classes
from opt.systems.shared.rows import TowerRows
from opt.systems.shared.towers import TowerSystem
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Output

Rows = TypeVar("Rows", bound=TowerRows)
ASKING = ("vqa-classes", "nlvr2")
"""Tasks that are answered from a list."""


class AskedRows:
    """The preparer of a model that is tuned for questions, over the preparer of its system. Picklable."""

    jpeg = True

    def __init__(self, rows: TowerRows, tuning: Tuning) -> None:
        self.rows, self.tuning = rows, tuning
        self.tasks = Tasks((tuning.task,), (1.0,))

    def inputs(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Batch:
        """As the system's own preparer."""
        return self.rows.inputs(samples, modalities)

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of the question beside each of its pictures."""
        sizes = self.rows.sizes(lengths)
        return np.maximum(self.tuning.about * (sizes["text"] + sizes["image"]), 1)

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch: questions with the answers' scores."""
        return self.questions([samples[int(number)] for number in plan.sample], answered=True)

    def questions(self, samples: Sequence[Sample], answered: bool = False) -> Batch:
        """Questions about `Tuning.about` pictures each. Raises UserError where one is about more or fewer, or has no
        words."""
        for sample in samples:
            self.tuning.require(sample)
        pictures = [dataclasses.replace(sample, pictures=(one,)) for sample in samples for one in sample.pictures]
        parts = {"text": self.rows.inputs(samples, ["text"]), "image": self.rows.inputs(pictures, ["image"])}
        scores = [self.tuning.scores(sample.answers) if answered else {} for sample in samples]
        label = [(row, place) for row, each in enumerate(scores) for place in each]
        right = Targets(torch.arange(len(samples)), torch.tensor(label, dtype=torch.int64).reshape(-1, 2))
        extra = {"answer_scores": torch.tensor([score for each in scores for score in each.values()])}
        batch = Packer(1, 1).batch([sample.key for sample in samples], {"answer": right}, extra,
                                   {"answer": len(samples)})
        return dataclasses.replace(batch, parts=parts, tokens=sum(part.tokens for part in parts.values()))


def asked(rows: Rows, tuning: Tuning) -> Rows | AskedRows:
    """The preparer of a system, or of its model tuned for questions."""
    return rows if tuning.task == "pretraining" else AskedRows(rows, tuning)


class Answering(TowerSystem):
    """A system of towers that answers from a list, by `pooled` states of the question beside each of its pictures.

    Its configuration has a `tuning`; its constructor calls `begin_answering`, its forward `answered` where the batch
    asks, and its preparer is `asked`.
    """

    answer_head: AnswerHead | None
    tunes: ClassVar[tuple[str, ...]] = ASKING
    """Tasks that it can be fine-tuned for."""

    def begin_answering(self, width: int) -> None:
        """The head over the list of answers, where there is one. Raises UserError for a task that is none of these."""
        tuning: Tuning = self.config.tuning
        if tuning.task not in ("pretraining", *self.tunes):
            raise UserError(f"system {self.name!r} is tuned for {', '.join(self.tunes)}; instead of {tuning.task} go "
                            f"on with its pretraining on your shards: `opt pretrain "
                            f"{self.name}.tiny --start model:...`")
        self.answer_head = AnswerHead(width * tuning.pictures, len(tuning.answers)) if tuning.answers else None

    def answered(self, batch: Batch) -> Output:
        """Binary cross-entropy of each answer of the list (ViLT, section 4.3)."""
        logits_QA, target = self._answer_logits(batch), batch.targets["answer"]
        target_QA = torch.zeros(logits_QA.shape, device=logits_QA.device)
        target_QA[target.label[:, 0], target.label[:, 1]] = batch.extra["answer_scores"]
        return Output({"answer": soft_classes(logits_QA, target_QA, batch.counts["answer"])})

    @torch.inference_mode()
    def answer(
        self, samples: Sequence[Sample], candidates: Sequence[str] | None = None, shortlist: int = 0
    ) -> list[str]:
        """The likeliest of the list of answers."""
        rows = self.preparer()
        if not isinstance(rows, AskedRows):
            raise self._cannot(f"answer before it is tuned for that (`opt finetune {' or '.join(ASKING)}`)")
        if candidates is not None:
            raise self._cannot(f"rank candidates: it answers from its own list of {len(rows.tuning.answers):,}")
        best_Q = self._answer_logits(rows.questions(samples).to(self.device)).argmax(dim=-1)
        return [rows.tuning.answers[place] for place in best_Q.tolist()]

    @property
    def answering(self) -> str:
        """How `answer` answers, in words for the note beside a figure."""
        return f"classified among {len(self.config.tuning.answers):,} answers" if self.answer_head else ""

    def _answer_logits(self, batch: Batch) -> Tensor:
        """How right each answer of the list is (Q, A), as log-odds."""
        assert self.answer_head is not None
        text, image = (self.unfused(name, batch.parts[name]) for name in ("text", "image"))
        question_P = np.repeat(np.arange(len(text)), len(image) // len(text))
        pooled_PW = self.pooled({"text": text.take(question_P), "image": image})
        return self.answer_head(pooled_PW.view(len(text), -1))
