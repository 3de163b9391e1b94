"""The probe that looks: finds what no pooled vector says, the same for the same seed, beside the linear one."""

import dataclasses

import numpy as np
import pytest
import torch

from eval import attention_probe, classification, probing
from eval.attention_probe import AttentionProbe, fit, frozen, look, scores
from opt.config import UserError
from opt.data.record import Picture, Sample
from opt.nn.states import States

CPU = torch.device("cpu")
LABELS = ("red", "blue", "green")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(attention_probe, "STEPS", 12)


@pytest.fixture
def given(make_task, monkeypatch):
    """Pictures of 3 to 6 tokens; a label is there where one token is the label's, whose mean over tokens is nought for
    all: what is added to one token is taken from another."""
    random = np.random.default_rng(0)
    names, tokens = random.normal(size=(3, 16)).astype(np.float32), {}
    samples, truth = [], {}
    for number in range(160):
        there = np.flatnonzero(random.random(3) < 0.5)
        rows = 0.3 * random.normal(size=(3 + number % 4, 16)).astype(np.float32)
        for label in there:
            first, second = random.choice(len(rows), 2, replace=False)
            rows[first] += 3 * names[label]
            rows[second] -= 3 * names[label]
        tokens[f"p{number}"] = rows - rows.mean(0)
        truth[f"p{number}"] = frozenset(LABELS[label] for label in there)
        picture = Picture(100 + number, 10, codes=np.zeros((8, 8), np.int16))
        samples.append(Sample(f"p{number}", (picture,), 0, "0", "words", np.ones((5, 4), np.float16)))
    task, train = make_task(samples[120:]), make_task(samples[:120]).split

    def alone(some, modality):
        if modality != "image":
            raise UserError(f"no {modality} here")
        rows = [tokens[one.key] for one in some]
        return States(torch.tensor(np.concatenate(rows)), np.array([len(each) for each in rows]))

    monkeypatch.setattr(task.system, "alone", alone)
    monkeypatch.setattr(task.system, "features", lambda some, modalities: torch.tensor(
        np.stack([tokens[one.key].mean(0) for one in some])))
    return task, train, truth


def test_it_finds_what_the_mean_hides_and_stands_beside_the_linear_probe(given, monkeypatch):
    monkeypatch.setattr(attention_probe, "STEPS", 100)
    task, train, truth = given
    metrics, absent, *_ = classification.measure(task, train, truth, attention=True)
    found = {metric.name: metric for metric in metrics}
    linear, looked = found["classify.map.image"].value, found["classify.attention.map.image"]
    assert linear < 0.75 and looked.value > linear + 0.15
    assert found["classify.attention.gain.image"].value == pytest.approx(looked.value - linear)
    assert found["classify.attention.map_micro.image"].protocol == "map/micro" and looked.protocol == "map/macro"
    assert looked.n == 40 and looked.chance == found["classify.map.image"].chance
    assert absent["classify.attention.map.text"] == "no text here" and "classify.attention.map.text" not in found
    plain = {metric.name: metric for metric in classification.measure(task, train, truth).metrics}
    assert not any("attention" in name for name in plain)
    assert plain["classify.map.image"].value == pytest.approx(linear)


def test_the_same_seed_gives_the_same_probe(given):
    task, train, truth = given
    exam = probing.open_exam(train, task.split, truth, 0)
    fitted, judged = ({"image": frozen(task, "image", numbers, split)} for numbers, split in (
        (exam.train_numbers, exam.train), (exam.test_numbers, exam.test)))
    first = look(exam, fitted, judged, CPU)
    torch.randn(7)
    np.random.random(7)
    again, other = look(exam, fitted, judged, CPU), look(dataclasses.replace(exam, seed=1), fitted, judged, CPU)
    assert np.array_equal(first.scores, again.scores) and not np.allclose(first.scores, other.scores)


def test_frozen_states_are_those_of_each_sample(given):
    task, train, _ = given
    states = frozen(task, "image", np.arange(10), train)
    assert not states.hidden.requires_grad and not states.hidden.is_inference()
    one = task.system.alone([train.sample(7)], "image")
    assert torch.equal(states.take(np.array([7])).hidden, one.hidden)


def test_a_sample_is_scored_alike_in_any_company_and_may_have_no_tokens():
    probe = AttentionProbe({"image": 6, "text": 4}, torch.tensor([0.2, 0.5])).eval()
    lengths = {"image": np.array([3, 0, 5]), "text": np.array([1, 2, 2])}
    parts = {name: States(torch.randn(int(each.sum()), {"image": 6, "text": 4}[name]), each)
             for name, each in lengths.items()}
    together = scores(probe, parts, np.arange(3), CPU)
    alone = np.concatenate([scores(probe, parts, np.array([row]), CPU) for row in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.isfinite(together).all()


def test_labels_that_do_not_count_teach_nothing(given):
    task, train, truth = given
    exam = probing.open_exam(train, task.split, truth, 0)
    fitted = {"image": frozen(task, "image", exam.train_numbers, train)}
    verified = np.random.default_rng(3).random(exam.train_labels.shape) < 0.6
    rows = np.arange(len(verified))
    found = [scores(fit(dataclasses.replace(exam, train_labels=labels, train_verified=verified), fitted, rows, 0.01,
                        CPU), fitted, rows, CPU)
             for labels in (exam.train_labels & verified, exam.train_labels | ~verified)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
