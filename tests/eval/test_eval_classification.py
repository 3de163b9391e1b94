"""Classification: macro and micro beside each other, verified labels alone where they are given, the worst pictures."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from eval import classification, probing
from eval.labelled import Truth
from eval.naming import read_verdicts
from opt.config import UserError
from opt.data.record import Picture, Sample

LABELS = ("red", "blue", "green")


def bits_of(number, random):
    """Picture `number` has the labels of its two bits; its regions say them with noise."""
    there = [bit for bit in range(3) if number % 7 + 1 >> bit & 1]
    regions = random.normal(size=(4, 6)).astype(np.float16)
    regions[:, there] += 1
    picture = Picture(100 + number, 10, regions=regions, codes=np.zeros((8, 8), np.int16))
    return Sample(f"p{number}", (picture,), 0, "0", "words", np.ones((5, 4), np.float16)), there


@pytest.fixture
def given(make_task):
    random = np.random.default_rng(0)
    samples, there = map(list, zip(*(bits_of(number, random) for number in range(90)), strict=True))
    truth = {one.key: frozenset(LABELS[bit] for bit in bits) for one, bits in zip(samples, there, strict=True)}
    task, train = make_task(samples[50:]), make_task(samples[:50]).split
    task.split.reader.lengths.regions[:] = 4

    def features(some, modalities):
        return torch.tensor(np.stack([one.pictures[0].regions.mean(0) for one in some])).float()

    task.system.features = features
    return task, train, truth


def test_micro_stands_beside_macro_for_every_subset(given):
    task, train, truth = given
    metrics, _, examples, worst = classification.measure(task, train, truth)
    found = {metric.name: metric for metric in metrics}
    exam = probing.open_exam(train, task.split, truth, 0)
    scores = classification.probe(task, exam, ("image",)).scores
    assert found["classify.map.image"].value == pytest.approx(
        average_precision_score(exam.test_labels, scores, average="macro"))
    assert found["classify.map_micro.image"].value == pytest.approx(
        average_precision_score(exam.test_labels, scores, average="micro"))
    assert found["classify.map_micro.image"].chance == pytest.approx(exam.test_labels.mean())
    assert {found[f"classify.{name}.image"].protocol for name in ("map", "map_micro")} == {"map/macro", "map/micro"}
    low, high = found["classify.map_micro.image"].interval
    assert low < found["classify.map_micro.image"].value < high
    assert "what is not labelled is absent" in found["classify.map.image"].candidates
    assert len(examples) == 24 and set(examples[0]["labels"]) == truth[examples[0]["key"]]
    assert worst and all(line["failure"].startswith("its labels at rank") for line in worst)


def test_the_worst_pictures_have_their_labels_lowest():
    labels = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], bool)
    scores = np.array([[4.0, 3, 2, 1], [1, 4, 3, 2], [3, 3, 3, 0]])
    truth = Truth(labels, None, np.ones((1, 3)))
    assert [truth.ranks(scores, row).tolist() for row in range(3)] == [[1], [4, 1], [3]]
    found = [truth.ranking_precision(scores, row) for row in range(3)]
    assert found == [1.0, 0.75, pytest.approx(1 / 3)]
    verified = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], bool)
    truth = Truth(labels, verified, np.ones((1, 3)))
    assert [truth.ranks(scores, row).tolist() for row in range(3)] == [[1], [2, 1], [1]]
    assert truth.failure(scores, 1) == "its labels at ranks 1, 2 of 2"


def test_unverified_labels_neither_train_nor_judge(given):
    """Half of what is absent is verified; the labels of the rest could be anything."""
    task, train, truth = given
    random = np.random.default_rng(1)
    absent = {key: frozenset(label for label in LABELS if label not in names and random.random() < 0.5)
              for key, names in truth.items()}  # fmt: skip
    exam = probing.open_exam(train, task.split, truth, 0, absent)
    for side, numbers, split in ((exam.test_verified, exam.test_numbers, task.split),
                                 (exam.train_verified, exam.train_numbers, train)):  # fmt: skip
        for row, number in enumerate(numbers):
            key = split.keys[number]
            counted = {exam.classes[place] for place in np.flatnonzero(side[row])}
            assert counted == truth[key] | absent[key]
    found = {metric.name: metric for metric in classification.measure(task, train, truth, absent).metrics}
    scores = classification.probe(task, exam, ("image",)).scores
    by_class = [average_precision_score(exam.test_labels[kept, c], scores[kept, c])
                for c, kept in enumerate(exam.test_verified.T)]  # fmt: skip
    assert found["classify.map.image"].value == pytest.approx(np.mean(by_class))
    kept = exam.test_verified
    assert found["classify.map_micro.image"].value == pytest.approx(
        average_precision_score(exam.test_labels[kept], scores[kept]))
    assert found["classify.map_micro.image"].chance == pytest.approx(exam.test_labels[kept].mean())
    assert f"only verified labels count, {kept.mean():.1%} of all pairs" in found["classify.map.image"].candidates


def test_a_masked_fit_is_the_fit_without_those_samples():
    random = np.random.default_rng(0)
    features = random.normal(size=(80, 4)).astype(np.float32)
    labels = features[:, :2] + random.normal(size=(80, 2)) > 0
    verified = random.random((80, 2)) < 0.6
    masked = probing.fit(features, labels, (1e-2, 1e-1), verified)
    for column, kept in enumerate(verified.T):
        alone = probing.fit(features[kept], labels[kept, column : column + 1], (1e-2, 1e-1))
        np.testing.assert_allclose(masked[:, :, column], alone[:, :, 0], atol=5e-3)
    everything = probing.fit(features, labels, (1e-2,), np.ones((80, 2), bool))
    np.testing.assert_allclose(everything, probing.fit(features, labels, (1e-2,)), atol=1e-5)


def test_lines_say_what_is_absent(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"image_id": "a", "labels": ["dog"], "absent": ["cat"]}\n{"image_id": "b", "labels": []}\n')
    assert read_verdicts(path) == ({"a": {"dog"}, "b": frozenset()}, {"a": {"cat"}})
    for absent, said in ((["dog"], "line 1: 'dog' stands in both"), ("cat", 'line 1: expected .*"absent"'),
                         ([3], 'line 1: expected .*"absent"')):  # fmt: skip
        path.write_text(json.dumps({"image_id": "a", "labels": ["dog"], "absent": absent}) + "\n")
        with pytest.raises(UserError, match=said):
            read_verdicts(path)
