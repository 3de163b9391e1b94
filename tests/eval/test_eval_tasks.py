"""Transcription, captions and the linear probe on a system whose answers are known."""

import dataclasses
import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eval import captioning, classification, speech
from eval.result import Metric, Result, measured, read_result, write_result
from opt.config import UserError
from opt.systems.system import Sampling

HERE = (Path("model"), Path("shards"))


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


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


def test_a_figure_says_how_its_text_was_searched_for(make_task, tmp_path):
    beams = Sampling(beams=4, length_penalty=0.5)
    heard = by_name(speech.measure(make_task((3, 1)), beams)[0])
    assert heard["transcribe.wer"].note == "beam search, 4 beams, length penalty 0.5"
    config = captioning.CaptionConfig(*HERE, sampling=beams, labels=write_labels(tmp_path / "l", 3, lambda n: ["cat"]))
    for name, metric in by_name(captioning.measure(make_task((3, 1)), config)[0]).items():
        assert "beam search, 4 beams" in metric.note, name


def test_transcription_without_speech_is_a_sentence(make_task):
    samples = [dataclasses.replace(sample, speech=None) for sample in make_task((2, 1)).split.reader.samples]
    with pytest.raises(UserError, match="nothing to transcribe"):
        speech.measure(make_task(samples))


def test_transcription_without_pictures_leaves_the_second_figure_out(make_task):
    samples = [dataclasses.replace(sample, pictures=()) for sample in make_task((3, 1)).split.reader.samples]
    metrics, absent, *_ = speech.measure(make_task(samples))
    assert list(by_name(metrics)) == ["transcribe.wer"]
    assert set(absent) == {"transcribe.wer_image_audio", "transcribe.wer_gain.image"}


def write_labels(path, count, label):
    path.write_text("".join(json.dumps({"image_id": f"scene-{n}", "labels": label(n)}) + "\n" for n in range(count)))
    return path


def test_captions_are_judged_by_the_objects_they_name(make_task, tmp_path):
    colors = ["red", "blue", "green", "white"]
    labels = write_labels(tmp_path / "labels.jsonl", 8, lambda n: [f"{colors[n % 4]} circle"])
    task = make_task((8, 2))
    task.system.generate_text = lambda samples, modalities, sampling: [
        f"a big {'green' if sample.key == 'scene-0' else colors[int(sample.key[6:]) % 4]} dotted circle"
        for sample in samples
    ]
    metrics, absent, examples, _ = captioning.measure(task, captioning.CaptionConfig(*HERE, labels=labels))
    found = by_name(metrics)
    assert found["caption.object_hit"].value == found["caption.object_precision"].value == 7 / 8
    assert found["caption.object_hit"].n == 8 and found["caption.object_hit"].chance < 0.6 and not absent
    assert len(examples[0]["references"]) == 2 and (task.folder / examples[0]["picture"]).is_file()


def test_captions_without_labels_still_have_a_figure(make_task, tmp_path):
    metrics, absent, *_ = captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE))
    assert [metric.name for metric in metrics] == ["caption.word_f1"]
    assert metrics[0].value == pytest.approx(2 * 2 / 8) and metrics[0].chance < metrics[0].value
    assert set(absent) == set(captioning.OBJECT_METRICS)
    foreign = write_labels(tmp_path / "labels.jsonl", 0, str)
    foreign.write_text('{"image_id": "elsewhere", "labels": ["cat"]}\n')
    with pytest.raises(UserError, match="labels for none"):
        captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE, labels=foreign))


def test_a_labels_file_without_labels_is_not_taken_for_none_given(make_task, tmp_path):
    empty = write_labels(tmp_path / "labels.jsonl", 0, str)
    with pytest.raises(UserError, match="holds no labels"):
        captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE, labels=empty))


def test_the_probe_finds_the_minimum_that_scikit_learn_finds():
    random = np.random.default_rng(0)
    features = random.standard_normal((120, 5)).astype(np.float32)
    labels = np.stack([features @ random.standard_normal(5) + random.standard_normal(120) > 0.5 for _ in range(3)], 1)
    for strength, weights in zip((1e-2, 1e-1), classification.fit(features, labels, (1e-2, 1e-1)), strict=True):
        for column in range(3):
            truth = LogisticRegression(C=1 / (strength * len(features)), tol=1e-8).fit(features, labels[:, column])
            assert weights[:-1, column] == pytest.approx(truth.coef_[0], abs=2e-2)
            assert weights[-1, column] == pytest.approx(truth.intercept_[0], abs=2e-2)


def test_the_probe_tells_blurred_modalities_from_clear_ones(make_task):
    samples = make_task((60, 1)).split.reader.samples
    labels = {sample.key: frozenset({f"class {number % 5}"}) for number, sample in enumerate(samples)}
    recoloured = [
        dataclasses.replace(sample, caption=f"x {number % 5}", pictures=(dataclasses.replace(
            sample.pictures[0], width=100 + number % 5),), speech=np.full((1, 2), number % 5, np.float16))
        for number, sample in enumerate(samples)
    ]  # fmt: skip
    task, train = make_task(recoloured[40:], blurred=("audio",)), make_task(recoloured[:40]).split
    metrics, absent, *_ = classification.measure(task, train, labels)
    found = by_name(metrics)
    assert len([name for name in found if name.startswith("classify.map.")]) == 7
    raw = {f"classify.baseline.{name}" for name in ("regions_mean", "regions_frames_mean", "all_raw")}
    assert set(absent) == raw and all("60 samples lack" in reason for reason in absent.values())
    assert found["classify.map.text"].value == pytest.approx(1.0)
    assert found["classify.map.audio"].value < 0.6 and found["classify.map.text"].chance == pytest.approx(0.2)
    gain = found["classify.gain_over.audio"]
    assert gain.interval[0] > 0 and gain.value == pytest.approx(
        found["classify.map.text_image_audio"].value - found["classify.map.audio"].value
    )
    with pytest.raises(UserError, match="in both folders"):
        classification.measure(task, task.split, labels)
    with pytest.raises(UserError, match="--labels has nothing"):
        classification.measure(task, train, {})


def test_probe_options_are_asked_for():
    with pytest.raises(UserError, match="--train-shards"):
        classification.classify(classification.ClassifyConfig(*HERE))
    with pytest.raises(UserError, match="--labels"):
        classification.classify(classification.ClassifyConfig(*HERE, train_shards=Path("train")))


def test_a_result_is_read_back_and_a_broken_one_is_a_sentence(make_task, tmp_path):
    metric = measured("a.b", np.array([1.0, 0.0]), 0, modalities=("text",))
    assert isinstance(metric, Metric) and metric.value == 0.5
    result = Result("a", (metric,), make_task((1, 1)).provenance, 1.0, {"a.c": "no data"}, [{"key": "k"}], [])
    path = write_result(result, tmp_path)
    assert read_result(path) == result
    path.write_text("{}")
    with pytest.raises(UserError, match="not a result"):
        read_result(path)
