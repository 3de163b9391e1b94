"""Zero-shot classification: the ensemble of prompts, both kinds of labels, and what cannot be sorted."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from eval.zero_shot import TEMPLATES, ZeroShotConfig, class_vectors, measure, zero_shot
from opt.config import UserError
from opt.systems.system import System

NAMES = ("bird", "cat", "dog", "elk", "fox", "gnu", "hen")
NAMED = np.random.default_rng(0).normal(size=(len(NAMES), 8)).astype(np.float32)


def config(**options) -> ZeroShotConfig:
    return ZeroShotConfig(Path("model"), Path("shards"), labels=(Path("labels"),), **options)


def words(sample) -> np.ndarray:
    """A sentence's vector is that of the name in it, moved by how long the sentence is."""
    (place,) = [place for place, name in enumerate(NAMES) if name in sample.caption]
    return NAMED[place] + 0.1 * len(sample.caption) * np.eye(8, dtype=np.float32)[len(sample.caption) % 8]


@pytest.fixture
def asked(make_task, monkeypatch):
    """A task of 30 pictures, told and spoken twice each; picture p has the vector of class p % 7, blurred."""
    task = make_task((30, 2))
    blur = np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32)

    def embed(samples, modalities):
        (name,) = modalities
        number = [0 if name == "text" else task.system.number(sample, name) for sample in samples]
        rows = [words(sample) if name == "text" else NAMED[place % 7] + blur[place]
                for sample, place in zip(samples, number, strict=True)]
        return torch.nn.functional.normalize(torch.tensor(np.stack(rows)), dim=-1)

    monkeypatch.setattr(task.system, "embed", embed)
    return task


def scores(task, templates) -> np.ndarray:
    """By hand: unit vectors, their mean, a unit again."""
    classes = []
    for name in NAMES:
        rows = [words(dataclasses.replace(task.split.sample(0), caption=each.format(name))) for each in templates]
        mean = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    pictures = task.system.embed([task.split.sample(2 * n) for n in range(30)], ("image",)).numpy()
    return pictures @ np.array(classes).T


def test_a_class_is_the_mean_of_its_sentences(asked):
    vectors = class_vectors(asked, NAMES, TEMPLATES)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    pictures = asked.system.embed([asked.split.sample(2 * n) for n in range(30)], ("image",)).numpy()
    np.testing.assert_allclose(pictures @ vectors.T, scores(asked, TEMPLATES), atol=1e-5)
    one = class_vectors(asked, NAMES, TEMPLATES[:1])
    assert not np.allclose(one, vectors, atol=1e-3)


def test_one_label_each_is_accuracy(asked):
    truth = {f"scene-{number}": frozenset({NAMES[number % 7]}) for number in range(30)}
    metrics, absent, examples, worst = measure(asked, config(), truth)
    found = {metric.name: metric for metric in metrics}
    order = np.argsort(-scores(asked, TEMPLATES), axis=1)
    right = np.arange(30)[:, None] % 7 == order
    assert set(found) == {"zero_shot.top1.image", "zero_shot.top5.image"} and not absent
    assert found["zero_shot.top1.image"].value == pytest.approx(right[:, 0].mean())
    assert found["zero_shot.top5.image"].value == pytest.approx(right[:, :5].any(1).mean())
    assert [metric.chance for metric in metrics] == pytest.approx([1 / 7, 5 / 7])
    assert found["zero_shot.top1.image"].n == 30 and "5 sentences a class" in metrics[0].note
    assert len(examples) == 24 and examples[3]["labels"] == [NAMES[3]]
    assert examples[3]["answer"] == NAMES[order[3, 0]] and worst[0]["failure"].startswith("its labels at rank ")


def test_several_labels_are_average_precision_and_hits(asked):
    random = np.random.default_rng(2)
    there = random.random((30, 7)) < 0.3
    there[4] = False
    truth = {f"scene-{row}": frozenset(np.array(NAMES)[there[row]].tolist()) for row in range(30)}
    given = scores(asked, TEMPLATES)
    found = {metric.name: metric for metric in measure(asked, config(), truth).metrics}
    assert set(found) == {"zero_shot.map.image", "zero_shot.map_micro.image", "zero_shot.hit1.image"}
    for name, average in (("map", "macro"), ("map_micro", "micro")):
        metric = found[f"zero_shot.{name}.image"]
        assert metric.value == pytest.approx(average_precision_score(there, given, average=average))
        assert metric.interval[0] < metric.value < metric.interval[1]
    hit = found["zero_shot.hit1.image"]
    some = there.any(1)
    assert hit.value == pytest.approx(there[np.arange(30), given.argmax(1)][some].mean()) and hit.n == some.sum()
    assert hit.chance == pytest.approx((there.sum(1) / 7)[some].mean())
    verified = there | (random.random((30, 7)) < 0.4)
    absent = {f"scene-{row}": frozenset(np.array(NAMES)[verified[row] & ~there[row]].tolist()) for row in range(30)}
    found = {metric.name: metric for metric in measure(asked, config(), truth, absent).metrics}
    assert found["zero_shot.map_micro.image"].value == pytest.approx(
        average_precision_score(there[verified], given[verified]))
    best = np.where(verified, given, -9).argmax(1)
    assert found["zero_shot.hit1.image"].value == pytest.approx(there[np.arange(30), best][some].mean())
    assert "only verified labels count" in found["zero_shot.map.image"].candidates


def test_recordings_are_queries_each(asked):
    truth = {f"scene-{number}": frozenset({NAMES[number % 7]}) for number in range(30)}
    found = {metric.name: metric for metric in measure(asked, config(of=("image", "audio")), truth).metrics}
    assert found["zero_shot.top1.audio"].n == 60 and found["zero_shot.top1.image"].n == 30
    assert found["zero_shot.top1.audio"].value == found["zero_shot.top1.image"].value, "both tellings are of one blur"
    assert found["zero_shot.top1.audio"].modalities == ("audio",)


def test_what_cannot_be_sorted_is_said(asked, make_task, monkeypatch):
    truth = {"scene-1": frozenset({"cat"}), "scene-2": frozenset({"dog"})}
    silent = make_task([dataclasses.replace(one, speech=None) for one in asked.split.reader.samples])
    monkeypatch.setattr(silent.system, "embed", asked.system.embed)
    metrics, absent, *_ = measure(silent, config(of=("image", "audio")), truth)
    assert absent["zero_shot.audio"] == "the shards hold no recording" and metrics
    assert absent["zero_shot.top5.image"] == "there are only 2 classes"
    with pytest.raises(UserError, match="nothing to classify: the shards hold no recording"):
        measure(silent, config(of=("audio",)), truth)
    with pytest.raises(UserError, match="nothing to classify: --labels names nothing"):
        measure(asked, config(), {"strange": frozenset({"cat", "dog"})})
    with pytest.raises(UserError, match="--labels names 1 class"):
        measure(asked, config(), {"scene-1": frozenset({"cat"})})
    monkeypatch.setattr(asked.system, "embed", System.embed.__get__(asked.system))
    with pytest.raises(UserError, match="nothing to classify: system 'fake' cannot embed"):
        measure(asked, config(), truth)


@pytest.mark.parametrize(("options", "said"), [
    ({"labels": ()}, "--labels is missing"), ({"of": ()}, "--of is empty"),
    ({"templates": ()}, "--templates is empty"), ({"templates": ("a photo",)}, "'a photo' must have {} once"),
])  # fmt: skip
def test_wrong_options_are_sentences(options, said):
    with pytest.raises(UserError, match=said):
        zero_shot(dataclasses.replace(config(), **options))
