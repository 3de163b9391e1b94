"""Captions: a picture described by the text decoder, with neither its caption nor its recording at hand.

pictures --system.generate_text--> captions --LabelFinder--> named objects, against the objects that are truly there
                                            \\--normalise--> overlap of words with the reference captions
                                            \\--ptb_words--> BLEU, ROUGE-L, CIDEr-D; METEOR and SPICE where Java runs
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.captions import java
from eval.captions.coco import LONGEST, CiderD, bleu, bleu_counts, bleu_intervals, rouge_l
from eval.captions.ptb import ptb_words
from eval.metrics import interval, resampled
from eval.naming import LabelFinder, read_labels
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task, open_task
from eval.words import NORMALISER, normalise, word_f1
from opt.config import UserError
from opt.systems.system import Sampling

OBJECT_METRICS = ("caption.object_hit", "caption.object_precision")
REFERENCE_METRICS = (
    "caption.word_f1", *(f"caption.bleu{length}" for length in range(1, LONGEST + 1)), "caption.rouge_l",
    "caption.cider_d", "caption.meteor", "caption.spice",
)  # fmt: skip
COCO_WORDS = "lower-case Penn-Treebank-like words without coco-caption's punctuation"


@dataclass
class CaptionConfig(EvalConfig):
    """Options of `opt eval caption`."""

    labels: Path | None = None
    """Objects that are truly in each picture: lines {"image_id": ..., "labels": ["red circle", ...]}."""
    sampling: Sampling = Sampling()
    """How the text is searched for: --sampling.beams 4 keeps four hypotheses under way."""


def caption(config: CaptionConfig) -> None:
    """Describe pictures in words: do the captions name objects that are there, and how like the references are they?

    Example: opt eval caption runs/demo/model runs/demo/shards/test --labels runs/demo/scenes/test_scenes.jsonl
    """
    task = open_task("caption", "caption", config)
    task.finish(measure(task, config))


def measure(task: Task, config: CaptionConfig) -> Findings:
    """Metrics, absent ones with reasons, examples and the worst.

    Raises UserError without a picture or with labels of other pictures.
    """
    split = task.split
    numbers = split.one_a_picture(split.with_all(("image",)))
    if not len(numbers):
        raise UserError(f"nothing to describe: {split.reading.absent(('image',))}")
    truth = {} if config.labels is None else read_labels(config.labels)
    labelled = np.array([split.keys[number] in truth for number in numbers])
    if truth and not labelled.any():
        raise UserError(f"{config.labels} has labels for none of the {len(numbers)} pictures of these shards")
    texts = task.batches(
        numbers, lambda samples: task.system.generate_text(samples, ("image",), config.sampling), "describe pictures"
    )
    written = dict(zip(numbers.tolist(), texts, strict=True))
    searched = config.sampling.for_text().protocol
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    if truth:
        finder = LabelFinder({label for labels in truth.values() for label in labels})
        named = {number: finder.find(text) for number, text in written.items()}
        metrics += _objects(task, numbers[labelled], named, truth, searched)
        if len(metrics) < len(OBJECT_METRICS):
            absent[OBJECT_METRICS[1]] = "no caption names a labelled object"
    else:
        absent |= dict.fromkeys(OBJECT_METRICS, "no --labels given")
    references = _references(task)
    told = np.array([number for number in numbers if split.groups[number] in references], np.int64)
    worst: list[dict[str, Any]] = []

    def example(number: int) -> dict[str, Any]:
        return {
            "key": split.keys[number],
            "picture": task.keep_picture(number),
            "references": references.get(int(split.groups[number]), []),
            "caption": written[number],
            "labels": sorted(truth.get(split.keys[number], ())),
        }

    if len(told):
        metrics.append(_word_overlap(task, told, written, references, searched))
        likeness = Likeness(task, told, written, references, searched)
        metrics += [*likeness.bleu(), likeness.rouge_l(), likeness.cider_d()]
        for name, by_java in (("caption.meteor", likeness.meteor), ("caption.spice", likeness.spice)):
            try:
                metrics.append(by_java())
            except UserError as reason:
                absent[name] = str(reason)
        worst = [example(number) | {"failure": why} for number, why in likeness.worst().items()]
    else:
        absent |= dict.fromkeys(REFERENCE_METRICS, "the shards hold no caption beside a picture")
    return Findings(metrics, absent, [example(number) for number in numbers[:EXAMPLES].tolist()], worst)


def _objects(
    task: Task, numbers: np.ndarray, named: dict[int, frozenset[str]], truth: dict[str, frozenset[str]], searched: str
) -> list[Metric]:
    """Share of captions that name at least one object rightly, and share of the named objects that are there."""
    there = [truth[task.split.keys[number]] for number in numbers]
    others = task.strangers(numbers)
    right = np.array([len(named[number] & labels) for number, labels in zip(numbers, there, strict=True)])
    said = np.array([len(named[number]) for number in numbers])
    guessed = np.array([len(named[other] & labels) for other, labels in zip(others, there, strict=True)])
    offered = np.array([len(named[other]) for other in others])
    about: dict[str, Any] = {
        "chance_method": "captions generated for other pictures",
        "modalities": ("image",),
        "direction": "image -> text",
        "normaliser": "a label counts when its noun and all its modifiers stand in one noun phrase",
    }
    seed, none = task.provenance.seed, int((said == 0).sum())
    metrics = [
        measured(
            OBJECT_METRICS[0], (right > 0).astype(float), seed, chance=float((guessed > 0).mean()),
            protocol="object-hit/labels", **about,
            note=f"{none} of {len(numbers)} captions name no labelled object; {searched}",
        )
    ]  # fmt: skip
    if said.sum():
        chance = float(guessed.sum() / max(offered.sum(), 1))
        note = f"of {said.sum()} named objects; {searched}"
        about["protocol"] = "object-precision/labels"
        metrics.append(measured(OBJECT_METRICS[1], right, seed, sizes=said, chance=chance, note=note, **about))
    return metrics


def _word_overlap(
    task: Task, numbers: np.ndarray, written: dict[int, str], references: dict[int, list[str]], searched: str
) -> Metric:
    groups = task.split.groups
    others = task.strangers(numbers)
    plain = {group: [normalise(text) for text in texts] for group, texts in references.items()}
    words = {number: normalise(written[number]) for number in numbers.tolist()}
    found = [word_f1(words[number], plain[groups[number]]) for number in numbers]
    guessed = [word_f1(words[other], plain[groups[number]]) for number, other in zip(numbers, others, strict=True)]
    return measured(
        "caption.word_f1",
        np.array(found),
        task.provenance.seed,
        chance=float(np.mean(guessed)),
        chance_method="captions generated for other pictures",
        modalities=("image",),
        direction="image -> text",
        protocol="word-f1/best-reference",
        normaliser=NORMALISER,
        note=f"F1 of words with their counts, best reference; {searched}",
    )


class Likeness:
    """The field's measures of how like the captions are to the references, beside those of captions dealt to others."""

    def __init__(
        self,
        task: Task,
        numbers: np.ndarray,
        written: dict[int, str],
        references: dict[int, list[str]],
        searched: str,
    ) -> None:
        words = {number: ptb_words(written[number]) for number in numbers.tolist()}
        cut = {group: [ptb_words(text) for text in texts] for group, texts in references.items()}
        self._numbers, self._seed = numbers.tolist(), task.provenance.seed
        self._captions = [words[number] for number in self._numbers]
        self._dealt = [words[number] for number in task.strangers(numbers).tolist()]
        self._references = [cut[int(task.split.groups[number])] for number in self._numbers]
        each = sum(map(len, self._references)) / len(numbers)
        self._about: dict[str, Any] = {
            "chance_method": "captions generated for other pictures",
            "modalities": ("image",),
            "direction": "image -> text",
            "normaliser": COCO_WORDS,
            "note": f"{each:.3g} references a picture; {searched}",
        }
        self._rouge_N = rouge_l(self._captions, self._references)
        self._judge = CiderD(self._references)
        self._cider_N = self._judge(self._captions)

    def bleu(self) -> list[Metric]:
        """Corpus BLEU-1..4."""
        counts = bleu_counts(self._captions, self._references)
        chances = bleu(bleu_counts(self._dealt, self._references))
        figures = zip(bleu(counts), bleu_intervals(counts, self._seed), chances, strict=True)
        return [
            Metric(
                f"caption.bleu{length}", float(value), len(counts), range_, float(chance), protocol="bleu/coco",
                **self._about,
            )
            for length, (value, range_, chance) in enumerate(figures, start=1)
        ]  # fmt: skip

    def rouge_l(self) -> Metric:
        return self._mean("caption.rouge_l", "rouge-l/coco", self._rouge_N, rouge_l(self._dealt, self._references))

    def cider_d(self) -> Metric:
        return self._mean("caption.cider_d", "cider-d/coco", self._cider_N, self._judge(self._dealt))

    def meteor(self) -> Metric:
        """METEOR of the set, which is no mean: its interval is the mean's, moved. Raises UserError without Java."""
        (value, scores_N), (chance, _) = java.meteor((self._captions, self._dealt), self._references)
        range_ = interval(resampled(scores_N, self._seed), value)
        return Metric("caption.meteor", value, len(scores_N), range_, chance, protocol="meteor-1.5/java", **self._about)

    def spice(self) -> Metric:
        """Mean SPICE. Raises UserError without Java or its models."""
        scores_N, dealt_N = java.spice((self._captions, self._dealt), self._references)
        return self._mean("caption.spice", "spice/java", scores_N, dealt_N)

    def worst(self) -> dict[int, str]:
        """The pictures whose captions are least like their references, worst first, and how little."""
        order = np.lexsort((self._rouge_N, self._cider_N))[:WORST]
        return {
            self._numbers[place]: f"CIDEr-D {100 * self._cider_N[place]:.1f}, ROUGE-L {100 * self._rouge_N[place]:.1f}"
            for place in order
        }

    def _mean(self, name: str, protocol: str, scores_N: np.ndarray, dealt_N: np.ndarray) -> Metric:
        chance = float(dealt_N.mean())
        return measured(name, scores_N, self._seed, chance=chance, protocol=protocol, **self._about)


def _references(task: Task) -> dict[int, list[str]]:
    """All captions of each picture, by its group number."""
    references: dict[int, list[str]] = {}
    for number in task.split.with_all(("text",)):
        references.setdefault(int(task.split.groups[number]), []).append(task.split.captions[number] or "")
    return references
