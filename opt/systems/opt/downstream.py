"""OPT's preparer for fine-tuning: clean rows whose batches feed the same forward as pretraining's.

    captioning           the picture alone -> the text decoder writes the caption: what inference sees (gap A22)
    retrieval-in-batch   text, picture and speech alone, all three pairs -> contrast in the shared space
    retrieval-hard       the same, and matching of true pairs against the false ones that the contrast takes for true
    retrieval-margin     the true pair, another picture, another text -> the matching head ranks them (gap A18)
    vqa-classes          question and picture -> the answer head, over a fixed list of answers (gap A22)
    vqa-words            question and picture -> the text decoder writes the answer
    nlvr2                sentence and left picture, sentence and right picture, side by side -> the answer head (UNITER)

Nothing is hidden. Heads that a task does not train run on no rows, so that every parameter has a gradient each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from opt.config import UserError
from opt.data import corrupt
from opt.data.batch import Batch, Targets
from opt.data.pack import Packer, Place
from opt.data.plan import BatchPlan, Tasks
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.states import ABSENT
from opt.systems.opt.collect import Clean, Collected
from opt.systems.opt.config import OPTConfig
from opt.systems.opt.rows import Rows
from opt.systems.shared.pairs import alignment_pairs, picture_number
from opt.systems.system import MODALITIES

TRUE, OTHER_PICTURE, OTHER_TEXT = range(3)
"""Columns of extra["ranked"]."""

class DownstreamRows(Rows):
    """The preparer of a model whose `config.tuning` names a task. Picklable."""

    def __init__(self, config: OPTConfig, tokenizer: Tokenizer, region_width: int, speech_width: int, codebook: int):
        super().__init__(config, tokenizer, region_width, speech_width, codebook)
        self.task = config.tuning.task
        self.tasks = Tasks((self.task,), (1.0,), (self.task,) if self.task == "retrieval-margin" else ())

    def cost(self, lengths: Lengths) -> np.ndarray:
        """Tokens of a sample's sequences and of what is written for it."""
        text = np.minimum(lengths.words + 2, self.config.text_positions) * (lengths.words > 0)
        size = {"text": text, "image": lengths.regions + 1, "audio": np.minimum(lengths.frames,
                                                                                self.config.frame_positions)}
        if self.task == "captioning":
            return text + sum(size[name] for name in self.config.tuning.given)
        if self.task == "retrieval-in-batch":
            return sum(size.values()) + 1
        if self.task == "retrieval-hard":
            return sum(size.values()) + 1 + 3 * (text + lengths.regions)
        if self.task == "nlvr2":
            return 2 * text + lengths.regions
        return (3 if self.task == "retrieval-margin" else 1) * (text + size["image"])

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> Batch:
        """A training batch of clean rows."""
        work = _Work(self, samples)
        for row, number in enumerate(map(int, plan.sample)):
            if self.task == "captioning":
                work.write(number, self.config.tuning.given, samples[number].caption or "")
            elif self.task in ("retrieval-in-batch", "retrieval-hard"):
                work.alone(number)
            elif self.task == "retrieval-margin":
                work.rank(number, [int(partner) for partner in plan.partners[row] if partner >= 0])
            elif self.task in ("vqa-classes", "nlvr2"):
                work.classify(number)
            else:  # one of the annotators' answers, another one in another epoch
                self.config.tuning.require(samples[number])
                answers = samples[number].answers
                drawn = corrupt.row_generator(int(plan.key[row])).integers(len(answers))
                work.write(number, ("text", "image"), answers[drawn])
        return work.batch(plan)

    def questions(self, samples: Sequence[Sample]) -> Batch:
        """Questions to be answered from the list: sequences of question and picture, `Tuning.about` a sample.

        Raises UserError where a picture has no regions.
        """
        work = _Work(self, dict(enumerate(samples)))
        for number, sample in enumerate(samples):
            if any(picture.regions is None for picture in sample.pictures):
                raise UserError(f"sample {sample.key!r} has no regions; questions are answered by them")
            work.ask(number)
        return work.packer.batch([sample.key for sample in samples], {}, {}, {})


class _Work:
    """One batch in the making: each method adds the sequences and targets of one row."""

    def __init__(self, rows: DownstreamRows, samples: dict[int, Sample]) -> None:
        self.rows, self.samples = rows, samples
        self.packer = Packer(rows.region_width, rows.speech_width)
        self.cleans: dict[int, Clean] = {}
        self.ranked: list[list[int]] = []
        self.asked: list[list[int]] = []
        self.answers: list[tuple[int, int]] = []
        self.scores: list[float] = []

    def write(self, number: int, given: tuple[str, ...], text: str) -> None:
        """The text decoder writes `text`, looking at the modalities `given` and nothing else."""
        tokenizer = self.rows.tokenizer
        ids = tokenizer.encode(text, self.rows.config.text_positions - 2)
        self.packer.write("text", np.concatenate([[tokenizer.bos], ids]), np.concatenate([ids, [tokenizer.eos]]),
                          self._sequence(number, given))

    def alone(self, number: int) -> None:
        """Each modality in a sequence of its own, for the contrast; [CLS] alone for a sample without any."""
        clean = self._clean(number, MODALITIES)
        present = [name for name, part in clean.parts.items() if len(part)]
        if not clean.alone:  # a batch may hold a sample twice
            clean.alone.update({name: self._sequence(number, (name,)) for name in present})
        if not present:
            self._sequence(number, ())

    def rank(self, number: int, partners: list[int]) -> None:
        """The true pair, its text with another picture, its picture with another text."""
        true = self._sequence(number, ("text", "image"))
        if len(partners) == 2:  # a batch of fewer than three pictures has none to offer
            picture, text = partners
            false = [self._pair(number, picture), self._pair(text, number)]
            self.ranked.append([true.number, *(place.number for place in false)])

    def classify(self, number: int) -> None:
        """[CLS] of question and picture, of each picture, against the list of answers."""
        places = self.ask(number)
        scores = self.rows.config.tuning.scores(self.samples[number].answers)
        self.answers += [(len(self.asked), answer) for answer in scores]
        self.scores += scores.values()
        self.asked.append([place.start for place in places])

    def ask(self, number: int) -> list[Place]:
        """The question beside each of its pictures, a sequence each."""
        sample = self.samples[number]
        self.rows.config.tuning.require(sample)
        words, places = self._clean(number, ("text",)).parts, []
        for picture in sample.pictures:
            seen, _ = self.rows.parts(self.packer, dataclasses.replace(sample, pictures=(picture,)), ("image",))
            places.append(self.packer.sequence("encoder", self.rows.join(self.packer, words | seen)))
        return places

    def batch(self, plan: BatchPlan) -> Batch:
        """Everything packed; targets of tasks that are not trained are empty."""
        rows = plan.sample.tolist()
        none, pairs = Collected(), alignment_pairs([self.cleans[number] for number in rows])
        asked = _integers(self.asked, self.rows.config.tuning.pictures)
        targets = {**none.targets(), "answer": Targets(asked, _integers(self.answers, 2))}
        extra = {**none.extra(), **pairs, "answer_scores": torch.tensor(self.scores, dtype=torch.float32)}
        if self.rows.task == "retrieval-margin":
            extra["ranked"] = _integers(self.ranked, 3)
        counts = {name: len(target.index) for name, target in targets.items()}
        counts |= {name: len(pair) for name, pair in pairs.items()} | {"ranked": 2 * len(self.ranked)}
        host = {}
        if self.rows.task == "retrieval-hard":
            host = self._matched_with(rows)
            extra["row_key"] = torch.from_numpy(plan.key.view(np.int64))
            extra["picture"] = torch.tensor([picture_number(self.samples[number]) for number in rows])
            counts["hard"] = len(pairs["align_text_image"])
        keys = [self.samples[number].key for number in rows]
        return self.packer.batch(keys, targets, extra, counts, ("text", "codes"), host)

    def _matched_with(self, rows: list[int]) -> dict[str, np.ndarray]:
        """Each row's sequences by modality, and that its picture is what its text is matched with."""
        alone = [self.cleans[number].alone for number in rows]
        numbers = [[each[name].number if name in each else ABSENT for name in MODALITIES] for each in alone]
        context = [["image" in each, False] for each in alone]
        return {"rows": np.array(numbers, np.int64), "context": np.array(context, bool)}

    def _clean(self, number: int, modalities: tuple[str, ...]) -> Clean:
        if number not in self.cleans:
            parts, ids = self.rows.parts(self.packer, self.samples[number], modalities)
            self.cleans[number] = Clean(self.samples[number], parts, {}, ids)
        return self.cleans[number]

    def _sequence(self, number: int, modalities: tuple[str, ...]) -> Place:
        parts = self._clean(number, modalities).parts
        chosen = {name: parts[name] for name in modalities if name in parts}
        return self.packer.sequence("encoder", self.rows.join(self.packer, chosen))

    def _pair(self, text: int, picture: int) -> Place:
        both = ("text", "image")
        parts = {"text": self._clean(text, both).parts["text"], "image": self._clean(picture, both).parts["image"]}
        return self.packer.sequence("encoder", self.rows.join(self.packer, parts))


def _integers(values: list, width: int = 0) -> torch.Tensor:
    """int64 (n,), or (n, width); well-shaped when empty."""
    return torch.tensor(values, dtype=torch.int64).reshape((-1, width) if width else (-1,))
