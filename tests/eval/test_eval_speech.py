"""Transcription of a system whose answers are known: errors by three normalisers, and what was taken for what."""

import dataclasses
import json

import jiwer
import numpy as np
import pytest

from eval import speech
from eval.metrics import bootstrap
from eval.words import AS_WRITTEN, NORMALISER
from opt.config import UserError
from opt.systems.system import Sampling


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


def told(task, captions):
    """The samples of a task with other captions."""
    pairs = zip(task.split.reader.samples, captions, strict=True)
    return [dataclasses.replace(sample, caption=caption) for sample, caption in pairs]


def test_transcripts_are_scored_as_jiwer_does(make_task):
    task = make_task((8, 2))
    metrics, absent, examples, _ = speech.measure(task)
    found = by_name(metrics)
    references = [sample.caption for sample in task.split.reader.samples]
    hypotheses = [f"caption number {text.split()[-1]}" for text in references]
    assert found["transcribe.wer"].value == pytest.approx(jiwer.wer(references, hypotheses))
    assert found["transcribe.wer"].better == "lower" and not absent
    assert found["transcribe.wer"].chance == pytest.approx(1 / 5)  # "number N" differs, nothing else
    assert examples[0]["reference"] == references[0] and len(examples) == 8
    assert examples[0]["hypotheses"]["audio"] == "Caption, number 0!"


def test_errors_by_word_and_letter_as_written_and_normalised(make_task):
    captions = ["The colour IS grey.", "Mr. Dog can't run -- at all!", "two dogs", "a well-kept ball"]
    heard = ["the color is gray", "mister dog can not run at all", "two  red dogs.", "a well kept wall"]
    task = make_task(told(make_task((4, 1)), captions))
    task.system.generate_text = lambda samples, modalities, sampling: [heard[int(sample.key[6:])] for sample in samples]
    metrics, absent, _, worst = speech.measure(task)
    found = by_name(metrics)
    single = ["two red dogs." if text.startswith("two") else text for text in heard]
    assert not absent and len(found) == 13
    assert found["transcribe.wer_raw"].value == pytest.approx(jiwer.wer(captions, single))
    assert found["transcribe.cer_raw"].value == pytest.approx(jiwer.cer(captions, single))
    plain = ["the colour is grey", "mr dog cant run at all", "two dogs", "a well kept ball"]
    bare = [*single[:2], "two red dogs", heard[3]]
    assert found["transcribe.wer"].value == pytest.approx(jiwer.wer(plain, bare)) == 7 / 16
    assert found["transcribe.cer"].value == pytest.approx(jiwer.cer(plain, bare))
    assert found["transcribe.wer_whisper"].value == pytest.approx(2 / 17)  # red, wall
    assert found["transcribe.wer_image_audio_whisper"].value == found["transcribe.wer_whisper"].value
    assert [found[f"transcribe.wer{end}"].normaliser for end in ("", "_raw")] == [NORMALISER, AS_WRITTEN]
    assert "Whisper" in found["transcribe.cer_whisper"].normaliser
    assert found["transcribe.cer"].protocol == "cer/corpus" and found["transcribe.wer_raw"].protocol == "wer/corpus"
    assert found["transcribe.wer"].note.startswith("5 substitutions, 0 deletions, 2 insertions")
    assert [entry["failure"] for entry in worst] == [
        "3 errors in 6 words", "2 errors in 4 words", "1 errors in 2 words", "1 errors in 4 words"
    ]  # fmt: skip
    assert worst[0]["reference"] == captions[1] and worst[0]["hypotheses"]["audio"] == heard[1]
    confusions = json.loads((task.folder / speech.CONFUSIONS).read_text())
    assert confusions["audio"] == confusions["image + audio"]
    totals = [confusions["audio"][kind] for kind in ("words", "substitutions", "deletions", "insertions")]
    assert totals == [16, 5, 0, 2]
    assert ["ball", "wall", 1] in confusions["audio"]["confusions"]
    assert ["", "red", 1] in confusions["audio"]["confusions"] and len(confusions["audio"]["confusions"]) == 7


def test_the_most_frequent_confusions_come_first(make_task):
    captions = ["a blue cat", "a red dog", "a red cat"]
    task = make_task(told(make_task((3, 1)), captions))
    task.system.generate_text = lambda samples, modalities, sampling: [
        sample.caption.replace("red", "green").replace("blue ", "") for sample in samples
    ]
    speech.measure(task)
    confusions = json.loads((task.folder / speech.CONFUSIONS).read_text())["audio"]["confusions"]
    assert confusions == [["red", "green", 2], ["blue", "", 1]]


def test_intervals_draw_the_recordings_of_a_picture_together(make_task):
    task = make_task((6, 4))
    task.system.generate_text = lambda samples, modalities, sampling: [
        "" if sample.key in ("scene-1", "scene-3") else sample.caption for sample in samples
    ]
    found = by_name(speech.measure(task)[0])
    errors = np.array([5 * (number // 4 in (1, 3)) for number in range(24)])
    sizes, groups = np.full(24, 5), np.repeat(np.arange(6), 4)
    assert found["transcribe.wer"].interval == pytest.approx(bootstrap(errors, 0, sizes, groups))
    assert found["transcribe.wer"].interval != pytest.approx(bootstrap(errors, 0, sizes))


def test_the_gain_of_a_picture_is_positive_where_it_saves_errors(make_task):
    task = make_task((4, 1))
    task.system.generate_text = lambda samples, modalities, sampling: [
        sample.caption if "image" in modalities else sample.caption.replace("of", "off") for sample in samples
    ]
    gain = by_name(speech.measure(task)[0])["transcribe.wer_gain.image"]
    assert gain.value == pytest.approx(1 / 5) and gain.better == "higher"


def test_each_normaliser_leaves_out_the_references_that_it_empties(make_task):
    captions = ["a dog", "?!", "um, mhm", "two cats"]
    task = make_task(told(make_task((4, 1)), captions))
    task.system.generate_text = lambda samples, modalities, sampling: [
        sample.caption.replace("?!", "what") for sample in samples
    ]
    found = by_name(speech.measure(task)[0])
    confusions = json.loads((task.folder / speech.CONFUSIONS).read_text())["audio"]
    assert confusions["words"] == 6 and not confusions["confusions"]
    counted = {end: found[f"transcribe.wer{end}"].n for end in ("", "_raw", "_whisper")}
    assert counted == {"": 3, "_raw": 4, "_whisper": 2}
    assert "1 recordings without words left out" in found["transcribe.cer_image_audio"].note
    assert "2 recordings without words left out" in found["transcribe.cer_whisper"].note
    assert found["transcribe.wer_gain.image"].n == 3 and "1 recordings" in found["transcribe.wer_gain.image"].note
    only = make_task(told(make_task((2, 1)), ["um", "mhm"]))
    only.system.generate_text = task.system.generate_text
    metrics, absent, *_ = speech.measure(only)
    assert "transcribe.wer" in by_name(metrics)
    assert "no reference has a word" in absent["transcribe.wer_whisper"]


def test_without_whispers_table_its_figures_are_absent_with_a_reason(make_task, monkeypatch):
    def missing():
        raise UserError("the table is missing: pip install it")

    monkeypatch.setattr(speech, "whisper_normaliser", missing)
    metrics, absent, *_ = speech.measure(make_task((3, 1)))
    assert len(metrics) == 9 and absent == {
        f"transcribe.{rate}{given}_whisper": "the table is missing: pip install it"
        for rate in ("wer", "cer")
        for given in ("", "_image_audio")
    }


def test_a_figure_says_how_its_text_was_searched_for(make_task):
    heard = by_name(speech.measure(make_task((3, 1)), Sampling(beams=4, length_penalty=0.5))[0])
    assert heard["transcribe.wer"].note.endswith("; beam search, 4 beams, length penalty 0.5")


def test_transcription_without_speech_is_a_sentence(make_task):
    samples = [dataclasses.replace(sample, speech=None) for sample in make_task((2, 1)).split.reader.samples]
    with pytest.raises(UserError, match="nothing to transcribe"):
        speech.measure(make_task(samples))


def test_transcription_without_pictures_leaves_the_second_figure_out(make_task):
    samples = [dataclasses.replace(sample, pictures=()) for sample in make_task((3, 1)).split.reader.samples]
    metrics, absent, *_ = speech.measure(make_task(samples))
    readings = ("", "_raw", "_whisper")
    assert list(by_name(metrics)) == [f"transcribe.{rate}{end}" for end in readings for rate in ("wer", "cer")]
    assert set(absent) == {
        "transcribe.wer_gain.image",
        *(f"transcribe.{rate}_image_audio{end}" for end in readings for rate in ("wer", "cer")),
    }
