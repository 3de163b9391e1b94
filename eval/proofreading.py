"""Captions with one wrong word: does a model find it by the picture or the speech, and know what stood there?

    captions --system.edited_captions--> one word changed --system.wrong_words--> how wrong each word is --> found
                                                                               \\-> what would be right --> corrected

The editor changes a word for one that a language model finds likely there, so that words alone should not tell; how far
they do is measured beside it, by pictures or speech of other samples. Some edits are as true as the caption was.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from eval.metrics import interval, micro_average_precision, resample_counts
from eval.reads import NOUNS
from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task, in_batches, open_task
from opt.config import UserError
from opt.data.record import Sample
from opt.systems.shared.proofreading import Edit, Proofreader, Word
from opt.systems.system import compose

CONTEXTS = ("image", "audio")
"""What captions are judged by, each by itself."""
NAMES = ("found", "found_by_words", "detection_ap", "corrected", "corrected_by_words")
"""What is measured by each."""


@dataclass
class ProofreadConfig(EvalConfig):
    """Options of `opt eval proofread`."""


@dataclass(frozen=True)
class Judged:
    """What a model said of edited captions, a row each. scores, labels, words (N, C): of each word how likely it is
    wrong, whether it is, and whether there is one at all; found, corrected (N,) bool."""

    said: list[list[Word]]
    scores: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    found: np.ndarray
    corrected: np.ndarray

    @staticmethod
    def of(said: list[list[Word]], edits: list[Edit]) -> Judged:
        """Raises ValueError where a caption was read as other words than those that were edited."""
        shape = len(said), max(map(len, said))
        scores, words, labels = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        for row, (told, edit) in enumerate(zip(said, edits, strict=True)):
            if told[edit.place].text != edit.edited:
                raise ValueError(f"word {edit.place} of {edit.caption!r} is read as {told[edit.place].text!r}")
            scores[row, : len(told)] = [word.wrong for word in told]
            words[row, : len(told)] = True
            labels[row, edit.place] = True
        best = np.where(words, scores, -1.0).argmax(axis=1)
        corrected = [told[edit.place].proposed == edit.original for told, edit in zip(said, edits, strict=True)]
        return Judged(said, scores, labels, words, labels[np.arange(len(said)), best], np.array(corrected))


def proofread(config: ProofreadConfig) -> None:
    """Change one word of each caption; does the model find it by the picture, or by the speech, and put it right?

    Example: opt eval proofread runs/vilem/model runs/demo/shards/test
    """
    task = open_task("proofread", "proofread", config)
    task.finish(measure(task))


def measure(task: Task) -> Findings:
    """Metrics by the picture and by the speech, absent ones with reasons, examples and the worst.

    Raises UserError for a model that does not learn from edits, and where there is no caption beside either.
    """
    system, split = task.system, task.split
    if not isinstance(system, Proofreader):
        raise UserError(f"system {system.name!r} cannot find wrong words; `opt eval proofread` is for vilem")
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    examples: list[dict[str, Any]] = []
    worst: list[dict[str, Any]] = []
    for context in CONTEXTS:
        numbers = split.with_all(("text", context))
        ask = partial(system.wrong_words, modalities=(context,))
        if refused := task.refusal(ask, int(numbers[0])) if len(numbers) else "":
            absent |= {f"proofread.{context}.{name}": refused for name in NAMES}
            continue
        edits = task.batches(numbers, lambda samples: system.edited_captions(samples, task.provenance.seed),
                             f"edit captions with a {NOUNS[context]}") if len(numbers) else []
        kept = [(int(number), edit) for number, edit in zip(numbers, edits, strict=True) if edit is not None]
        if not kept:
            reason = "no caption has a word that can be changed" if len(numbers) else (
                split.reading.absent(("text", context)))
            absent |= {f"proofread.{context}.{name}": reason for name in NAMES}
            continue
        own, other = _judged(task, system, kept, context)
        metrics += _metrics(task, kept, context, own, other)
        examples += [_example(task, kept, own, context, row) for row in range(min(EXAMPLES, len(kept)))]
        worst += _worst(task, kept, own, context)
    if not metrics:
        raise UserError(f"nothing to proofread: {next(iter(absent.values()))}")
    return Findings(metrics, absent, examples[:EXAMPLES], worst[:WORST])


def _judged(task: Task, system: Proofreader, kept: list[tuple[int, Edit]], context: str) -> tuple[Judged, Judged]:
    """By each sample's own picture or speech, and by another's."""
    numbers, edits = np.array([number for number, _ in kept]), [edit for _, edit in kept]

    def load(number: int, edit: Edit, shown: int) -> Sample:
        text = dataclasses.replace(task.split.sample(number), caption=edit.caption)
        return compose(text=text, **{context: task.split.sample(shown)})

    def by(shown: np.ndarray, label: str) -> Judged:
        loads = [partial(load, number, edit, int(each)) for (number, edit), each in zip(kept, shown, strict=True)]
        said = in_batches(loads, lambda samples: system.wrong_words(samples, (context,)), task.batch, label)
        return Judged.of(said, edits)

    return by(numbers, f"find the wrong word by the {NOUNS[context]}"), by(task.strangers(numbers), "by another's")


def _metrics(task: Task, kept: list[tuple[int, Edit]], context: str, own: Judged, other: Judged) -> list[Metric]:
    seed, groups = task.provenance.seed, task.split.groups[[number for number, _ in kept]]
    counts = own.words.sum(axis=1)
    (usual, times), *_ = Counter(edit.original for _, edit in kept).most_common(1)
    even: dict[str, Any] = {"chance": float((1 / counts).mean()), "chance_method": "1 / words: a word drawn evenly"}
    majority: dict[str, Any] = {
        "chance": times / len(kept), "chance_method": f"always {usual!r}, the word most often changed",
    }  # fmt: skip
    about: dict[str, Any] = {"modalities": ("text", context), "direction": f"text + {context} -> word"}
    words = f"{counts.mean():.3g} words a caption, one of them changed by the model's own editor"
    size = f"the vocabulary of {task.system.tokenizer.size:,}"
    given = {**about, "note": "at the place of the wrong word, which is given"}
    elsewhere = {**about, "note": f"judged by the {NOUNS[context]} of another sample: what the words alone give away"}
    return [
        measured(f"proofread.{context}.found", own.found.astype(float), seed, groups=groups, candidates=words,
                 protocol="proofread/argmax", **even, **about),
        measured(f"proofread.{context}.found_by_words", other.found.astype(float), seed, groups=groups,
                 candidates=words, protocol="proofread/argmax", **even, **elsewhere),
        _average_precision(f"proofread.{context}.detection_ap", own, groups, seed, candidates=words, **about),
        measured(f"proofread.{context}.corrected", own.corrected.astype(float), seed, groups=groups, candidates=size,
                 protocol="proofread/top-1", **majority, **given),
        measured(f"proofread.{context}.corrected_by_words", other.corrected.astype(float), seed, groups=groups,
                 candidates=size, protocol="proofread/top-1", **majority, **elsewhere),
    ]  # fmt: skip


def _average_precision(name: str, judged: Judged, groups: np.ndarray, seed: int, **about: Any) -> Metric:
    """Of all words of all captions in one list, by how likely each is wrong; resampled by pictures."""
    scores, labels, words = judged.scores, judged.labels, judged.words
    value = float(micro_average_precision(scores, labels, verified_NC=words))
    weights_SN = resample_counts(np.unique(groups, return_inverse=True)[1], seed)
    draws = micro_average_precision(scores, labels, weights_SN, words)
    return Metric(
        name, value, len(labels), interval(draws, value), chance=float(len(labels) / words.sum()),
        chance_method="the share of wrong words", protocol="proofread/average-precision", **about,
    )  # fmt: skip


def _example(task: Task, kept: list[tuple[int, Edit]], judged: Judged, context: str, row: int) -> dict[str, Any]:
    (number, edit), said = kept[row], judged.said[row]
    return {
        "key": task.split.keys[number],
        "picture": task.keep_picture(number),
        "by": context,
        "caption": task.split.captions[number],
        "edited": edit.caption,
        "wrong": edit.edited,
        "right": edit.original,
        "found": max(said, key=lambda word: word.wrong).text,
        "proposed": said[edit.place].proposed,
    }


def _worst(task: Task, kept: list[tuple[int, Edit]], judged: Judged, context: str) -> list[dict[str, Any]]:
    """The captions whose wrong word seemed least likely to be wrong."""
    thought = judged.scores[judged.labels]
    return [
        _example(task, kept, judged, context, row) | {"failure": f"thought wrong with {thought[row]:.3f}"}
        for row in np.argsort(thought, kind="stable")[:WORST].tolist() if not judged.found[row]
    ]  # fmt: skip
