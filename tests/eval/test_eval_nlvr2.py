"""NLVR2's two measures on a system whose answers are known, and the verb from files to a result."""

import dataclasses
import json
from pathlib import Path

import pytest
from fixtures import fake_sample, fake_shards

from eval import nlvr2
from eval.task import Split
from opt.config import UserError
from opt.data.questions import Questions

LINES = [
    (("sample1", "sample2"), "both red", "true", "a"), (("sample2", "sample3"), "both red", "false", "a"),
    (("sample4", "sample5"), "one star", "true", "b"), (("sample5", "sample6"), "one star", "true", "b"),
    (("sample7", "sample8"), "both red", "True", "c"), (("sample8", "sample9"), "both red", "false", "c"),
    (("sample9", "sample1"), "more blue", None, ""),
]  # fmt: skip


@pytest.fixture
def task(make_task, tmp_path: Path):
    samples = [fake_sample(number) for number in range(12)]
    samples = [dataclasses.replace(sample, pictures=(dataclasses.replace(sample.pictures[0], jpeg=b"jpeg of %d" % n),))
               for n, sample in enumerate(samples)]  # fmt: skip
    reader = fake_shards(tmp_path / "shards", samples)
    path = tmp_path / "statements.jsonl"
    path.write_text("".join(json.dumps({
        "image_ids": keys, "question": text, "answers": [answer] if answer else [], "set": name}) + "\n"
        for keys, text, answer, name in LINES))  # fmt: skip
    return dataclasses.replace(make_task((2, 1)), name="nlvr2", split=Split(Questions(reader, path, answered=False)))


def test_accuracy_and_consistency_by_hand(task) -> None:
    """Always true: right on a-1, b-1, b-2, c-1; of three sentences b alone is judged right throughout."""
    task.system.answer = lambda asked: ["true" for sample in asked if len(sample.pictures) == 2]
    metrics, absent, examples, worst = nlvr2.measure(task)
    found = {metric.name: metric for metric in metrics}
    accuracy, consistency = found["nlvr2.accuracy"], found["nlvr2.consistency"]
    assert accuracy.value == accuracy.chance == pytest.approx(4 / 6) and accuracy.n == 6
    assert consistency.value == consistency.chance == pytest.approx(1 / 3) and consistency.n == 3
    assert (accuracy.protocol, consistency.protocol) == ("nlvr2/accuracy", "nlvr2/consistency")
    assert "'true'" in accuracy.chance_method and not absent and len(examples) == 7
    assert consistency.candidates == "3 sentences with 2.0 pairs of pictures each"
    assert [(line["image_ids"], line["failure"]) for line in worst] == [
        (["sample2", "sample3"], "1 of the sentence's 2 pairs judged wrong"),
        (["sample8", "sample9"], "1 of the sentence's 2 pairs judged wrong"),
    ]
    written = [json.loads(line) for line in (task.folder / "nlvr2_answers.jsonl").read_text().splitlines()]
    assert len(written) == 7 and written[0] == {
        "image_ids": ["sample1", "sample2"], "question": "both red", "answer": "true", "answers": ["true"]}


def test_sentences_are_drawn_whole_for_intervals(task) -> None:
    """Every pair right but those of one sentence: resamples draw sentences, so the interval is that of three."""
    task.system.answer = lambda asked: [{"true": "true", "True": "true"}.get((sample.answers or ("",))[0], "false")
                                        if "star" not in sample.caption else "false" for sample in asked]
    found = {metric.name: metric for metric in nlvr2.measure(task).metrics}
    assert found["nlvr2.accuracy"].value == found["nlvr2.consistency"].value == pytest.approx(2 / 3)
    assert found["nlvr2.accuracy"].interval == pytest.approx(found["nlvr2.consistency"].interval)
    assert found["nlvr2.accuracy"].interval[0] == 0.0


def test_without_sets_the_words_of_a_sentence_make_one(task) -> None:
    reader = task.split.reader
    reader.questions = [question._replace(set="") for question in reader.questions]
    task.system.answer = lambda asked: ["true" for _ in asked]
    assert {metric.name: metric.n for metric in nlvr2.measure(task).metrics}["nlvr2.consistency"] == 2


def test_both_pictures_are_kept(task) -> None:
    task.system.answer = lambda asked: ["true" for _ in asked]
    kept = nlvr2.measure(task).examples[0]
    assert kept["pictures"] == ["pictures/sample1.jpg", "pictures/sample2.jpg"]
    assert [(task.folder / path).read_bytes() for path in kept["pictures"]] == [b"jpeg of 1", b"jpeg of 2"]


def test_other_answers_and_no_answers_are_said(task, tmp_path: Path) -> None:
    task.system.answer = lambda asked: ["true" for _ in asked]
    reader = task.split.reader
    reader.questions[0] = reader.questions[0]._replace(answers=("red",))
    with pytest.raises(UserError, match="'both red' is answered by 'red', not true or false"):
        nlvr2.measure(task)
    reader.questions[0] = reader.questions[0]._replace(answers=("True", "false"))
    with pytest.raises(UserError, match="'both red' is answered by both true and false"):
        nlvr2.measure(task)
    reader.questions = [question._replace(answers=()) for question in reader.questions]
    findings = nlvr2.measure(task)
    assert not findings.metrics and set(findings.absent) == {"nlvr2.accuracy", "nlvr2.consistency"}
    with pytest.raises(UserError, match="--statements is missing"):
        nlvr2.nlvr2(nlvr2.NLVR2Config(tmp_path, tmp_path))
