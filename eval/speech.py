"""Transcription: what is said in a recording, by the text decoder, from sound alone and from picture and sound.

recordings --system.generate_text--> hypotheses --normalise, align words--> errors / reference words (corpus WER)
                                          \\--> transcripts.jsonl, a line a recording
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.result import Findings, Metric, measured
from eval.task import EXAMPLES, EvalConfig, Task, open_task
from eval.words import NORMALISER, normalise, word_errors
from opt.config import UserError
from opt.data.record import Sample
from opt.files import write_atomic
from opt.systems.system import Sampling

GIVEN = {"transcribe.wer": ("audio",), "transcribe.wer_image_audio": ("image", "audio")}
GAIN = "transcribe.wer_gain.image"
GREEDY = Sampling()
TRANSCRIPTS = "transcripts.jsonl"
"""In the results' folder: {"sample": number in the shards, "key", "reference", and a hypothesis by what was given}."""


@dataclass
class TranscribeConfig(EvalConfig):
    """Options of `opt eval transcribe`."""

    sampling: Sampling = GREEDY
    """How the text is searched for: --sampling.beams 4 keeps four hypotheses under way."""


def transcribe(config: TranscribeConfig) -> None:
    """Write down what is said, from the recording alone and with its picture: word error rate.

    Example: opt eval transcribe runs/demo/model runs/demo/shards/test
    """
    task = open_task("transcribe", "transcribe", config)
    task.finish(measure(task, config.sampling))


def measure(task: Task, sampling: Sampling = GREEDY) -> Findings:
    """Metrics, absent ones with reasons, and examples. Raises UserError when no recording has a transcript."""
    numbers = task.split.with_all(("text", "audio"))
    references = {number: normalise(task.split.captions[number] or "") for number in numbers}
    spoken = np.array([number for number in numbers if references[number]], np.int64)
    if not len(spoken):
        raise UserError("nothing to transcribe: the shards hold no recording with its words")
    dropped = len(numbers) - len(spoken)
    metrics: list[Metric] = []
    absent: dict[str, str] = {}
    hypotheses: dict[tuple[str, ...], dict[int, str]] = {}
    for name, given in GIVEN.items():
        some = spoken[task.split.has["image"][spoken]] if "image" in given else spoken
        if not len(some):
            absent[name] = "the shards hold no picture with speech"
            continue
        texts = _transcripts(task, given, some, sampling)
        hypotheses[given] = dict(zip(some.tolist(), texts, strict=True))
        left_out = f"{dropped} recordings without words left out; " if dropped else ""
        note = left_out + sampling.for_text().protocol
        metrics.append(_word_error_rate(task, name, given, some, references, hypotheses[given], note))
    if len(hypotheses) == len(GIVEN):
        metrics.append(_gain_of_picture(task, references, hypotheses, dropped))
    else:
        absent[GAIN] = "the shards hold no picture with speech"
    _write_transcripts(task, spoken, hypotheses)
    shown = task.split.one_a_picture(spoken)[:EXAMPLES]
    return Findings(metrics, absent, [_example(task, int(number), hypotheses) for number in shown])


def _transcripts(task: Task, given: tuple[str, ...], numbers: np.ndarray, sampling: Sampling) -> list[str]:
    def write(samples: list[Sample]) -> list[str]:
        return task.system.generate_text(samples, given, sampling)

    return task.batches(numbers, write, f"transcribe from {' + '.join(given)}")


def _word_error_rate(
    task: Task,
    name: str,
    given: tuple[str, ...],
    numbers: np.ndarray,
    references: dict[int, str],
    hypotheses: dict[int, str],
    note: str,
) -> Metric:
    """Corpus WER, beside that of captions handed to the wrong recordings."""
    words = np.array([len(references[number].split()) for number in numbers])
    errors = np.array([word_errors(references[number], normalise(hypotheses[number])) for number in numbers])
    others = task.strangers(numbers)
    guesses = [
        word_errors(references[number], references[other]) for number, other in zip(numbers, others, strict=True)
    ]
    return measured(
        name,
        errors,
        task.provenance.seed,
        sizes=words,
        groups=task.split.groups[numbers],
        chance=float(np.sum(guesses) / words.sum()),
        chance_method="captions of other pictures",
        better="lower",
        modalities=given,
        direction=f"{' + '.join(given)} -> text",
        normaliser=NORMALISER,
        note=note,
    )


def _gain_of_picture(
    task: Task, references: dict[int, str], hypotheses: dict[tuple[str, ...], dict[int, str]], dropped: int
) -> Metric:
    """Corpus WER from sound alone minus that from picture and sound, on the recordings with a picture (OPT, Table 4).

    The difference of two ratios over the same words is the ratio of the differences, so its interval is paired.
    """
    numbers = np.array(list(hypotheses["image", "audio"]), np.int64)
    words = np.array([len(references[number].split()) for number in numbers])
    alone, both = (
        np.array([word_errors(references[number], normalise(hypotheses[given][number])) for number in numbers])
        for given in GIVEN.values()
    )
    note = "paired difference over the same recordings"
    return measured(
        GAIN,
        alone - both,
        task.provenance.seed,
        sizes=words,
        groups=task.split.groups[numbers],
        modalities=("image", "audio"),
        direction="audio -> text, minus image + audio -> text",
        normaliser=NORMALISER,
        note=f"{note}; {dropped} recordings without words left out" if dropped else note,
    )


def _write_transcripts(task: Task, numbers: np.ndarray, hypotheses: dict[tuple[str, ...], dict[int, str]]) -> None:
    """Every hypothesis as it was written, before normalisation."""
    lines = []
    for number in numbers.tolist():
        written = {" + ".join(given): texts[number] for given, texts in hypotheses.items() if number in texts}
        heard = {"sample": number, "key": task.split.keys[number], "reference": task.split.captions[number]}
        lines.append(json.dumps(heard | written, ensure_ascii=False) + "\n")
    task.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(task.folder / TRANSCRIPTS, "".join(lines).encode())


def _example(task: Task, number: int, hypotheses: dict[tuple[str, ...], dict[int, str]]) -> dict[str, Any]:
    return {
        "key": task.split.keys[number],
        "picture": task.keep_picture(number),
        "reference": task.split.captions[number],
        "hypotheses": {" + ".join(given): texts[number] for given, texts in hypotheses.items() if number in texts},
    }
