"""Paired differences against a recomputation by hand, raw features as baselines, and how the page shows both."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import classification, probing, retrieval, speech
from eval.metrics import interval, mean_average_precision, resample_counts
from eval.raw_features import raw_features, vocabulary
from eval.report import ReportConfig, report
from eval.result import Metric, Provenance, Result, write_result
from eval.words import normalise, word_errors
from opt.data.record import Picture, Sample

PROVENANCE = Provenance("opt", "a" * 64, "b" * 64, 200, 0, "opt eval X", "0.1.0")


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


def resampled(values, sizes, groups):
    """Ratio of sums, and its interval over the resamples that all metrics share, one resample at a time."""
    draws = [(values * counts).sum() / (sizes * counts).sum() for counts in resample_counts(groups, 0)]
    return values.sum() / sizes.sum(), interval(np.array(draws))


def hears_badly(task):
    """Recordings 0, 3, 6, ... are misheard, whatever is seen; 1, 4, 7, ... only without the picture."""

    def write(samples, modalities, sampling):
        return ["noise" if (number := int(sample.key[6:])) % 3 == 0 or (number % 3 == 1 and "image" not in modalities)
                else sample.caption for sample in samples]  # fmt: skip

    task.system.generate_text = write
    return task


def test_what_the_picture_spares_is_paired_by_recording_and_resampled_by_picture(make_task):
    task = hears_badly(make_task((30, 2)))
    metrics, absent, *_ = speech.measure(task)
    gain = by_name(metrics)["transcribe.wer_gain.image"]
    references = [normalise(sample.caption) for sample in task.split.reader.samples]
    words = np.array([len(text.split()) for text in references])
    heard = [{given: normalise(task.system.generate_text([sample], given, None)[0]) for given in speech.GIVEN.values()}
             for sample in task.split.reader.samples]  # fmt: skip
    errors = {given: np.array([word_errors(text, said[given]) for text, said in zip(references, heard, strict=True)])
              for given in speech.GIVEN.values()}  # fmt: skip
    value, ends = resampled(errors["audio",] - errors["image", "audio"], words, task.split.groups)
    assert gain.value == pytest.approx(value) and gain.interval == pytest.approx(ends) and not absent
    found = by_name(metrics)
    assert gain.value == pytest.approx(found["transcribe.wer"].value - found["transcribe.wer_image_audio"].value)
    assert gain.value == pytest.approx(1 / 3) and gain.better == "higher" and gain.interval[0] > 0.1
    lines = (task.folder / speech.TRANSCRIPTS).read_text().splitlines()
    assert len(lines) == 60 and '"sample": 2, "key": "scene-1"' in lines[2] and '"audio": "noise"' in lines[2]


def test_only_recordings_with_a_picture_are_compared(make_task):
    samples = make_task((9, 1)).split.reader.samples
    samples[1] = dataclasses.replace(samples[1], pictures=())
    gain = by_name(speech.measure(hears_badly(make_task(samples)))[0])["transcribe.wer_gain.image"]
    assert gain.n == 8 and gain.value == pytest.approx(2 / 8)


def test_a_system_that_does_not_look_gains_exactly_nothing(make_task):
    task = make_task((12, 2), blurred=("image",))
    gains = [by_name(speech.measure(task)[0])["transcribe.wer_gain.image"]]
    config = retrieval.RetrievalConfig(Path("model"), Path("shards"), by=("alignment",))
    gains += [metric for metric in retrieval.measure(task, config)[0] if metric.name.startswith(retrieval.GAIN)]
    assert len(gains) == 4 and all(gain.value == 0 and gain.interval == (0, 0) for gain in gains)


def test_what_the_recording_adds_is_counted_on_the_same_queries(make_task):
    samples = make_task((24, 2)).split.reader.samples
    for silent in (3, 20):
        samples[silent] = dataclasses.replace(samples[silent], speech=None)
    task = make_task(samples, blurred=("text",))
    embed = task.system.embed  # the fake embeds the first modality: here the recording speaks for both
    task.system.embed = lambda some, given: embed(some, ("audio",) if given == ("text", "audio") else given)
    config = retrieval.RetrievalConfig(Path("model"), Path("shards"), by=("alignment",))
    found = by_name(retrieval.measure(task, config)[0])
    gain = found[f"{retrieval.GAIN}.r1"]
    text = np.array([number == 0 for number in range(24) for _ in range(2)])  # all captions look like picture 0's
    there = np.delete(np.arange(48), [3, 20])
    groups = np.unique(task.split.groups[there], return_inverse=True)[1]
    value, ends = resampled((1.0 - text)[there], np.ones(46), groups)
    assert (gain.value, gain.n) == (pytest.approx(value), 46) and gain.interval == pytest.approx(ends)
    assert found["retrieval.text_to_image.r1"].n == 48


def make_exam(make_task, labels=("red", "blue", "green")):
    """40 training and 30 test pictures whose regions tell the label, whose frames tell half of it."""
    random = np.random.default_rng(0)

    def sample(number):
        kind = number % 3
        regions = random.normal(size=(4, 6)).astype(np.float16)
        regions[:, kind] += 3
        speech_TD = random.normal(size=(5, 4)).astype(np.float16)
        speech_TD[:, 0] += 2 * (kind == 0)
        picture = Picture(100 + number, 10, regions=regions, codes=np.zeros((8, 8), np.int16))
        return Sample(f"p{number}", (picture,), 0, "0", f"some {labels[kind]}!", speech_TD)

    samples = [sample(number) for number in range(70)]
    truth = {sample.key: frozenset({labels[number % 3]}) for number, sample in enumerate(samples)}
    task, train = make_task(samples[40:]), make_task(samples[:40]).split
    task.split.reader.lengths.regions[:] = 4

    def features(some, modalities):  # the model's own features: the captions' kind, as noise would have it
        return torch.tensor(np.stack([np.concatenate([one.speech.mean(0)[:2] * (name == "audio")
                                      + one.pictures[0].regions.mean(0)[:2] * (name == "image") for name in modalities])
                                      for one in some])).float()  # fmt: skip

    task.system.features = features
    return task, train, truth


def test_raw_features_are_probed_on_the_same_samples(make_task):
    task, train, truth = make_exam(make_task)
    metrics, absent, *_ = classification.measure(task, train, truth)
    found = by_name(metrics)
    assert not absent and found["classify.baseline.regions_mean"].value > 0.99
    assert found["classify.baseline.bag_of_words"].value == pytest.approx(1.0)
    assert 0.4 < found["classify.baseline.frames_mean"].value < 0.9
    exam = probing.open_exam(train, task.split, truth, 0)
    sides = [np.stack([split.sample(int(n)).speech.astype(np.float32).mean(0) for n in numbers])
             for split, numbers in ((train, exam.train_numbers), (task.split, exam.test_numbers))]  # fmt: skip
    by_hand = exam.probe(*sides)
    assert found["classify.baseline.frames_mean"].value == pytest.approx(by_hand.value)
    assert found["classify.baseline.regions_frames_mean"].modalities == ("image", "audio")
    assert all(metric.n == 30 for metric in metrics)


def test_gains_of_classification_are_paired_over_the_same_resamples(make_task):
    task, train, truth = make_exam(make_task)
    found = by_name(classification.measure(task, train, truth)[0])
    gains = [name for name in found if name.startswith("classify.gain.")]
    assert len(gains) == 6 + 3 + 5
    for name in gains:
        more, less = name.removeprefix("classify.gain.").split("_over_")
        lesser = found.get(f"classify.map.{less}") or found[f"classify.baseline.{less}"]
        assert found[name].value == pytest.approx(found[f"classify.map.{more}"].value - lesser.value), name
    assert found["classify.gain.image_audio_over_audio"].modalities == ("image", "audio")


def test_paired_scores_move_together():
    random = np.random.default_rng(1)
    labels, seed = random.random((40, 3)) < 0.3, 4
    better, worse = labels + random.normal(size=(2, 40, 3)) * [[[0.5]], [[1.0]]]
    resamples = resample_counts(np.arange(40) // 2, seed)
    exam = probing.Exam(None, None, None, np.arange(40), None, labels, (), (), resamples, seed)
    gain = exam.judge(better).minus(exam.judge(worse)).metric("x", n=40)
    draws = []
    for counts in resamples:  # the resample spelt out: every sample as often as it was drawn
        chosen = np.repeat(np.arange(40), counts)
        draws.append(float(mean_average_precision(better[chosen], labels[chosen])
                           - mean_average_precision(worse[chosen], labels[chosen])))  # fmt: skip
    assert gain.interval == pytest.approx(interval(np.array(draws), gain.value))
    none = exam.judge(better).minus(exam.judge(better)).metric("x", n=40)
    assert none.value == 0 and none.interval == (0, 0)


def test_raw_features_of_what_is_missing_are_absent():
    columns = vocabulary(["a red, red star", None, "a"])
    assert columns == {"a": 0, "red": 1, "star": 2}
    found = raw_features(Sample("k", caption="Red red moon", speech=np.array([[1, 3], [3, 5]], np.float16)), columns)
    assert found["text"].tolist() == [0, 2, 0] and found["audio"].tolist() == [2, 4] and "image" not in found
    empty = Picture(8, 8, regions=np.zeros((0, 3), np.float16))
    full = Picture(8, 8, regions=np.array([[1, 2, 3]], np.float16))
    assert raw_features(Sample("k", (empty,), caption=" "), columns) == {}
    assert raw_features(Sample("k", (empty, full)), columns)["image"].tolist() == [1, 2, 3]


def test_the_page_shows_gains_as_differences_and_baselines_beside_the_model(make_task, tmp_path):
    task, train, truth = make_exam(make_task)
    folder = tmp_path / "run" / "results"
    classified, absent, *_ = classification.measure(task, train, truth)
    write_result(Result("classify", tuple(classified), PROVENANCE, 1.0, absent), folder)
    spoken = hears_badly(make_task((6, 1)))
    write_result(Result("transcribe", tuple(speech.measure(spoken)[0]), PROVENANCE, 1.0), folder)
    config = retrieval.RetrievalConfig(Path("model"), Path("shards"), by=("alignment",))
    write_result(Result("retrieval", tuple(retrieval.measure(make_task((6, 1)), config)[0]), PROVENANCE, 1.0), folder)
    report(ReportConfig((tmp_path / "run",)))
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("no model: mean region", "What each modality adds", "to image + audio: ", "What the picture spares",
                  "What the recording adds to the caption", "What the model adds to its raw features"):  # fmt: skip
        assert words in page, words
    assert "classify.gain" not in page and "retrieval.gain" not in page and "wer_gain" not in page


def test_a_page_of_older_results_needs_no_gains(tmp_path):
    scores = (Metric("classify.map.text", 0.7, 200, (0.6, 0.8), 0.1, modalities=("text",)),)
    write_result(Result("classify", scores, PROVENANCE, 1.0), tmp_path / "results")
    report(ReportConfig((tmp_path,)))
    assert "adds" not in (tmp_path / "report.html").read_text()
