"""Questions about scenes: right by their truth, without ambiguity, hard to guess."""

import json
from collections import Counter
from pathlib import Path

import pytest

from feature_extract.sources.scene_questions import HIDDEN_MOST, NUMBERS, ask, blind
from feature_extract.sources.spoken_scenes import ScenesConfig, _truth, draw, scenes

SCENES = [_truth(draw(7, index), []) for index in range(400)]
QUESTIONS = [ask(scene) for scene in SCENES]


def matching(scene: dict, words: list[str]) -> list[dict]:
    """Objects that have every color and shape among the words."""
    return [thing for thing in scene["objects"]
            if all(word in (thing["color"], thing["shape"]) for word in words if word != "thing")]


def test_every_answer_is_the_only_right_one() -> None:
    for scene, questions in zip(SCENES, QUESTIONS, strict=True):
        for question in questions:
            words, (answer,) = question["question"].rstrip("?").split(), question["answers"]
            if question["kind"] == "count":
                shape = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
                assert len(matching(scene, [shape])) == NUMBERS.index(answer)
            elif question["kind"] == "there":
                assert bool(matching(scene, words[3:])) == (answer == "yes")
            elif question["kind"] == "ground":
                assert answer == scene["ground"]
            else:
                (thing,) = matching(scene, words[4:])
                assert thing[question["kind"]] == answer and thing["hidden"] <= HIDDEN_MOST


def test_a_blind_guess_is_weak_and_every_kind_is_asked() -> None:
    lines = [question for questions in QUESTIONS for question in questions]
    counts = Counter(line["kind"] for line in lines)
    assert set(counts) == {"color", "shape", "count", "there", "ground"} and min(counts.values()) > 300
    assert blind(lines) < 0.35
    yes = Counter(line["answers"][0] for line in lines if line["kind"] == "there")["yes"] / counts["there"]
    assert 0.4 < yes < 0.6
    numbers = Counter(line["answers"][0] for line in lines if line["kind"] == "count")
    assert max(numbers.values()) / counts["count"] < 0.55


def test_blind_by_hand() -> None:
    lines = [{"kind": kind, "answers": [answer]} for kind, answer in
             (("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("b", "z"))]
    assert blind(lines) == pytest.approx(3 / 5)
    assert blind([]) == 0.0


def test_a_folder_from_before_gets_its_questions_without_drawing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ScenesConfig(out=tmp_path, train=3, val=0, test=0, seed=5, workers=1)
    scenes(config)
    path = tmp_path / "train_questions.jsonl"
    written = path.read_bytes()
    assert {json.loads(line)["image_id"] for line in written.splitlines()} == {f"s5-{n:08d}" for n in range(3)}
    assert "a blind guess is right in" in capsys.readouterr().out
    path.unlink()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def refuse(*scene: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("feature_extract.sources.spoken_scenes._write_scene", refuse)
    scenes(config)
    assert path.read_bytes() == written
    assert all(file.read_bytes() == content for file, content in before.items())
