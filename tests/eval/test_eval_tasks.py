"""The linear probe on a system whose answers are known, and the files of results."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eval import classification, probing
from eval.result import Metric, Result, measured, read_result, write_result
from opt.config import UserError

HERE = (Path("model"), Path("shards"))


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


def test_the_probe_finds_the_minimum_that_scikit_learn_finds():
    random = np.random.default_rng(0)
    features = random.standard_normal((120, 5)).astype(np.float32)
    labels = np.stack([features @ random.standard_normal(5) + random.standard_normal(120) > 0.5 for _ in range(3)], 1)
    for strength, weights in zip((1e-2, 1e-1), probing.fit(features, labels, (1e-2, 1e-1)), strict=True):
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
    with pytest.raises(UserError, match="--train-limit 0"):
        classification.classify(
            classification.ClassifyConfig(*HERE, train_shards=Path("train"), labels=HERE, train_limit=0))


def test_a_result_is_read_back_and_a_broken_one_is_a_sentence(make_task, tmp_path):
    metric = measured("a.b", np.array([1.0, 0.0]), 0, modalities=("text",))
    assert isinstance(metric, Metric) and metric.value == 0.5
    result = Result("a", (metric,), make_task((1, 1)).provenance, 1.0, {"a.c": "no data"}, [{"key": "k"}], [])
    path = write_result(result, tmp_path)
    assert read_result(path) == result
    whole = path.read_text()
    for broken, words in (("{}", "not a result"), (whole.replace("0.5", "NaN"), "holds NaN or infinity"),
                          (whole.replace("0.5", "1e999"), "holds NaN or infinity")):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(UserError, match=words):
            read_result(path)
