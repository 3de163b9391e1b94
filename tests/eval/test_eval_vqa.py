"""VQA accuracy against hand-worked examples, and the verb's figures on a system whose answers are known."""

import dataclasses
import json

import pytest

from eval.vqa import Ranked, VQAConfig, accuracy, kind, measure, vqa
from opt.config import UserError


@pytest.mark.parametrize(("answer", "annotators", "wanted"), [
    ("red", ["red"], 1.0),
    ("a Red!", ["red"], 1.0),
    ("blue", ["red"], 0.0),
    ("red", ["red"] * 10, 1.0),
    ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
    # three said it: leaving out one of them (3 times) two agree, 2/3; leaving out another (7 times) three agree, 1
    ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7) / 10),
    ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("red", ["red"] + ["blue"] * 9, (0 + 9 * 1 / 3) / 10),
    ("green", ["red"] * 3 + ["blue"] * 7, 0.0),
    # fewer than four annotators: all the others must agree
    ("red", ["red", "red"], 1.0),
    ("red", ["red", "blue"], 0.5),
    ("red", ["red", "red", "blue"], (1 / 2 + 1 / 2 + 1) / 3),
])  # fmt: skip
def test_accuracy_by_hand(answer: str, annotators: list[str], wanted: float) -> None:
    assert accuracy(answer, annotators) == pytest.approx(wanted)


def test_questions_are_of_the_kind_of_their_answer() -> None:
    assert kind(("yes", "yes", "2")) == "yes_no"
    assert kind(("2",)) == "number" and kind(("red", "red", "no")) == "other"


def test_figures_stand_beside_the_most_frequent_answer(make_task) -> None:
    answers = [("yes",), ("yes",), ("no",), ("4",), ("red",), ("red",), ("red",), ()]
    samples = [dataclasses.replace(sample, caption=f"question {number}?", answers=given) for number, (sample, given)
               in enumerate(zip(make_task((8, 1)).split.reader.samples, answers, strict=True))]
    task = make_task(samples)
    task.system.answer = lambda asked: ["yes" if sample.caption < "question 3" else "red" for sample in asked]
    metrics, absent, examples, worst = measure(task)
    found = {metric.name: metric for metric in metrics}
    assert found["vqa.accuracy"].value == pytest.approx(5 / 7) and found["vqa.accuracy"].n == 7
    assert found["vqa.accuracy"].chance == pytest.approx(3 / 7) and "'red'" in found["vqa.accuracy"].chance_method
    assert found["vqa.accuracy.yes_no"].value == found["vqa.accuracy.yes_no"].chance == pytest.approx(2 / 3)
    assert found["vqa.accuracy.number"].value == 0.0 and found["vqa.accuracy.other"].value == 1.0
    assert not absent and examples[0]["question"] == "question 0?" and examples[0]["answer"] == "yes"
    assert {metric.protocol for metric in metrics} == {"vqa/soft"}
    assert [line["failure"] for line in worst] == ["said 'yes', right is 'no'", "said 'red', right is '4'"]
    written = [json.loads(line) for line in (task.folder / "fake_answers.jsonl").read_text().splitlines()]
    assert len(written) == 8 and written[7]["answers"] == [] and written[7]["answer"] == "red"


def test_without_questions_it_says_so(tmp_path) -> None:
    with pytest.raises(UserError, match="--questions is missing"):
        vqa(VQAConfig(tmp_path, tmp_path))


def test_candidates_reach_the_system_and_the_note(make_task) -> None:
    samples = [dataclasses.replace(sample, caption="what?", answers=("red",)) for sample in
               make_task((4, 1)).split.reader.samples]  # fmt: skip
    task, given = make_task(samples), []

    def answer(asked, candidates=None, shortlist=0):
        given.append((candidates, shortlist))
        return [candidates[1]] * len(asked)

    task.system.answer = answer
    metrics, *_ = measure(task, Ranked(("blue", "red", "green"), 2))
    assert set(given) == {(("blue", "red", "green"), 2)}
    assert metrics[0].value == 1.0 and metrics[0].note.startswith("the likeliest of 3 candidates, of which 2 by")
    assert "first token" not in Ranked(("blue", "red"), 2).protocol
    assert "not divided by the length" in Ranked(("blue",), 0).protocol


def test_candidates_out_of_range_are_sentences(tmp_path) -> None:
    path = tmp_path / "q"
    path.write_text(json.dumps({"image_id": "a", "question": "what?"}) + "\n")
    with pytest.raises(UserError, match="--candidates 0 must be at least 1"):
        vqa(VQAConfig(tmp_path, tmp_path, questions=path, rank_answers_of=path, candidates=0))
    with pytest.raises(UserError, match="--shortlist is for answers that are ranked: give --rank-answers-of"):
        vqa(VQAConfig(tmp_path, tmp_path, questions=path, shortlist=0))
    with pytest.raises(UserError, match="no question there has an answer to rank"):
        vqa(VQAConfig(tmp_path, tmp_path, questions=path, rank_answers_of=path))
