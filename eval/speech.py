"""Transcription: what is said in a recording, by the text decoder, from sound alone and from picture and sound.

recordings --system.generate_text--> hypotheses --normaliser, align--> errors / reference words or letters (WER, CER)
                                          \\--> transcripts.jsonl, a line a recording
                                          \\--> confusions.json, which words were taken for which, and how often
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, WORST, EvalConfig, Task, open_task
from eval.words import (
    AS_WRITTEN,
    NORMALISER,
    align,
    as_written,
    edit_kinds,
    normalise,
    whisper_normaliser,
    word_errors,
)
from opt.config import UserError
from opt.data.record import Sample
from opt.files import write_atomic
from opt.systems.system import Sampling

GIVEN = {"": ("audio",), "_image_audio": ("image", "audio")}
"""By the ending of a metric's name, what the system is given."""
RATES: dict[str, Callable[[str], Sequence[str]]] = {"wer": str.split, "cer": str}
"""By the name of a rate, what a normalised text is cut into: words, or characters with the spaces among them."""
GAIN = "transcribe.wer_gain.image"
GREEDY = Sampling()
TRANSCRIPTS = "transcripts.jsonl"
"""In the results' folder: {"sample": number in the shards, "key", "reference", and a hypothesis by what was given}."""
KINDS = {"replace": "substitutions", "delete": "deletions", "insert": "insertions"}
CONFUSIONS = "confusions.json"
"""In the results' folder, by what was given: totals of "words", "substitutions", "deletions" and "insertions", and
"confusions", a list of [reference word, hypothesis word, times], the most frequent first; "" stands for no word. Words
are those of the usual normaliser."""
CONFUSIONS_KEPT = 200


class Reading(NamedTuple):
    """One way of reading texts before they are compared."""

    ending: str
    """Of the names of its metrics."""
    label: str
    normalised: Callable[[str], str]


@dataclass
class TranscribeConfig(EvalConfig):
    """Options of `opt eval transcribe`."""

    sampling: Sampling = GREEDY
    """How the text is searched for: --sampling.beams 4 keeps four hypotheses under way."""


def transcribe(config: TranscribeConfig) -> None:
    """Write down what is said, from the recording alone and with its picture: word and character error rates.

    Beside the result: transcripts.jsonl, every one as written, and confusions.json, which words were taken for which.

    Example: opt eval transcribe runs/demo/model runs/demo/shards/test
    """
    task = open_task("transcribe", "transcribe", config)
    task.finish(measure(task, config.sampling))


def measure(task: Task, sampling: Sampling = GREEDY) -> Findings:
    """Metrics, absent ones with reasons, examples and the worst.

    Raises UserError when no recording has a transcript.
    """
    numbers = task.split.with_all(("text", "audio"))
    spoken = np.array([number for number in numbers if normalise(task.split.captions[number] or "")], np.int64)
    if not len(spoken):
        unread = task.split.reading.unread(("text", "audio"))
        raise UserError(f"nothing to transcribe: {unread or 'the shards hold no recording with its words'}")
    readings, absent = _readings()
    metrics: list[Metric] = []
    hypotheses: dict[str, dict[int, str]] = {}
    for ending, given in GIVEN.items():
        some = numbers[task.split.has["image"][numbers]] if "image" in given else numbers
        reason = _unable(task, given, some, sampling)
        if reason and given == ("audio",):
            raise UserError(f"nothing to transcribe: {reason}")
        if reason:
            names = [f"transcribe.{rate}{ending}{reading.ending}" for reading in readings for rate in RATES]
            absent |= dict.fromkeys(names, reason)
            continue
        hypotheses[ending] = dict(zip(some.tolist(), _transcripts(task, given, some, sampling), strict=True))
        for reading in readings:
            found = _rates(task, ending, some, reading, hypotheses[ending], sampling)
            metrics += found
            if not found:
                names = [f"transcribe.{rate}{ending}{reading.ending}" for rate in RATES]
                absent |= dict.fromkeys(names, "no reference has a word that this normaliser keeps")
    if "transcribe.wer_image_audio" in absent:
        absent[GAIN] = absent["transcribe.wer_image_audio"]
    else:
        metrics.append(_gain_of_picture(task, hypotheses))
    task.folder.mkdir(parents=True, exist_ok=True)
    _write_transcripts(task, spoken, hypotheses)
    _write_confusions(task, hypotheses)
    shown = [int(number) for number in task.split.one_a_picture(spoken)[:EXAMPLES]]
    worst = _worst(task, hypotheses[""])
    return Findings(
        metrics,
        absent,
        [_example(task, number, hypotheses) for number in shown],
        [_example(task, number, hypotheses) | {"failure": why} for number, why in worst.items()],
    )


def _readings() -> tuple[list[Reading], dict[str, str]]:
    """The three readings, which remember texts that come again, and what is absent where Whisper's is."""
    readings = [Reading("", NORMALISER, cache(normalise)), Reading("_raw", AS_WRITTEN, as_written)]
    try:
        label, whisper = whisper_normaliser()
    except UserError as reason:
        names = [f"transcribe.{rate}{ending}_whisper" for ending in GIVEN for rate in RATES]
        return readings, dict.fromkeys(names, str(reason))
    return [*readings, Reading("_whisper", label, cache(whisper))], {}


def _unable(task: Task, given: tuple[str, ...], numbers: np.ndarray, sampling: Sampling) -> str:
    """Why nothing can be written from `given`: the shards hold no such sample, or the system cannot; else nothing."""
    if not len(numbers):
        return task.split.reading.absent(given)
    return task.refusal(lambda samples: task.system.generate_text(samples, given, sampling), int(numbers[0]))


def _transcripts(task: Task, given: tuple[str, ...], numbers: np.ndarray, sampling: Sampling) -> list[str]:
    def write(samples: list[Sample]) -> list[str]:
        return task.system.generate_text(samples, given, sampling)

    return task.batches(numbers, write, f"transcribe from {' + '.join(given)}")


def _rates(
    task: Task,
    ending: str,
    numbers: np.ndarray,
    reading: Reading,
    hypotheses: dict[int, str],
    sampling: Sampling,
) -> list[Metric]:
    """Corpus WER and CER, beside those of captions handed to the wrong recordings; none where no reference is left."""
    references = {number: reading.normalised(task.split.captions[number] or "") for number in numbers.tolist()}
    kept = np.array([number for number in numbers.tolist() if references[number]], np.int64)
    if not len(kept):
        return []
    pairs = [(references[number], reading.normalised(hypotheses[number])) for number in kept.tolist()]
    others = [references[number] for number in task.strangers(kept).tolist()]
    dropped = len(numbers) - len(kept)
    notes = [f"{dropped} recordings without words left out"] if dropped else []
    metrics = []
    for rate, cut in RATES.items():
        edits = [edit_kinds(cut(reference), cut(hypothesis)) for reference, hypothesis in pairs]
        sizes = np.array([len(cut(reference)) for reference, _ in pairs])
        guesses = sum(
            edit_kinds(cut(reference), cut(other)).total() for (reference, _), other in zip(pairs, others, strict=True)
        )
        kinds = ", ".join(f"{sum(edit[kind] for edit in edits)} {name}" for kind, name in KINDS.items())
        metrics.append(
            measured(
                f"transcribe.{rate}{ending}{reading.ending}",
                np.array([edit.total() for edit in edits]),
                task.provenance.seed,
                sizes=sizes,
                groups=task.split.groups[kept],
                chance=float(guesses / sizes.sum()),
                chance_method="captions of other pictures",
                better="lower",
                modalities=GIVEN[ending],
                direction=f"{' + '.join(GIVEN[ending])} -> text",
                protocol=f"{rate}/corpus",
                normaliser=reading.label,
                note="; ".join([kinds, *notes, sampling.for_text().protocol]),
            )
        )
    return metrics


def _gain_of_picture(task: Task, hypotheses: dict[str, dict[int, str]]) -> Metric:
    """Corpus WER from sound alone minus that from picture and sound, on the recordings with a picture (OPT, Table 4).

    The difference of two ratios over the same words is the ratio of the differences, so its interval is paired.
    """
    pictured = {number: normalise(task.split.captions[number] or "") for number in hypotheses["_image_audio"]}
    references = {number: text for number, text in pictured.items() if text}
    alone, both = (
        np.array([word_errors(text, normalise(hypotheses[ending][number])) for number, text in references.items()])
        for ending in GIVEN
    )
    dropped = len(pictured) - len(references)
    note = "paired difference over the same recordings"
    return measured(
        GAIN,
        alone - both,
        task.provenance.seed,
        sizes=np.array([len(text.split()) for text in references.values()]),
        groups=task.split.groups[list(references)],
        modalities=("image", "audio"),
        direction="audio -> text, minus image + audio -> text",
        protocol="wer/corpus",
        normaliser=NORMALISER,
        note=f"{note}; {dropped} recordings without words left out" if dropped else note,
    )


def _worst(task: Task, hypotheses: dict[int, str]) -> dict[int, str]:
    """The recordings with most errors from sound alone, worst first, and how many: by number in the split."""
    counted = []
    for number, text in hypotheses.items():
        reference = normalise(task.split.captions[number] or "")
        if reference and (errors := word_errors(reference, normalise(text))):
            counted.append((-errors, number, f"{errors} errors in {len(reference.split())} words"))
    return {number: why for _, number, why in sorted(counted)[:WORST]}


def _write_transcripts(task: Task, numbers: np.ndarray, hypotheses: dict[str, dict[int, str]]) -> None:
    """Every hypothesis as it was written, before normalisation."""
    lines = []
    for number in numbers.tolist():
        written = {" + ".join(GIVEN[ending]): texts[number] for ending, texts in hypotheses.items() if number in texts}
        heard = {"sample": number, "key": task.split.keys[number], "reference": task.split.captions[number]}
        lines.append(json.dumps(heard | written, ensure_ascii=False) + "\n")
    write_atomic(task.folder / TRANSCRIPTS, "".join(lines).encode())


def _write_confusions(task: Task, hypotheses: dict[str, dict[int, str]]) -> None:
    """Totals of the edits between words, and which words they were; see CONFUSIONS."""
    content = {}
    for ending, texts in hypotheses.items():
        totals: Counter[str] = Counter()
        confused: Counter[tuple[str, str]] = Counter()
        for number, text in texts.items():
            reference = normalise(task.split.captions[number] or "").split()
            for edit in align(reference, normalise(text).split()) if reference else []:
                totals["words"] += edit.kind != "insert"
                if edit.kind != "equal":
                    totals[edit.kind] += 1
                    confused[edit.reference, edit.hypothesis] += 1
        content[" + ".join(GIVEN[ending])] = {
            "words": totals["words"],
            **{name: totals[kind] for kind, name in KINDS.items()},
            "confusions": [[*pair, times] for pair, times in confused.most_common(CONFUSIONS_KEPT)],
        }
    write_atomic(task.folder / CONFUSIONS, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _example(task: Task, number: int, hypotheses: dict[str, dict[int, str]]) -> dict[str, Any]:
    return {
        "key": task.split.keys[number],
        "picture": task.keep_picture(number),
        "reference": task.split.captions[number],
        "hypotheses": {
            " + ".join(GIVEN[ending]): texts[number] for ending, texts in hypotheses.items() if number in texts
        },
    }
