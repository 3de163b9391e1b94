"""Statements about two scenes: right by their truth, as often true as false, and no picture alone gives them away."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from feature_extract.sources.scene_questions import HIDDEN_MOST, NUMBERS
from feature_extract.sources.scene_statements import BLOCK, KINDS, blind, state
from feature_extract.sources.spoken_scenes import ScenesConfig, _truth, draw, scenes

SCENES = [_truth(draw(7, index), []) for index in range(320)]
LINES = state(SCENES)
BY_ID = {scene["image_id"]: scene for scene in SCENES}


def things(scene: dict, words: str) -> list[dict]:
    """Objects that words such as "red thing", "red things", "crosses" or "star" name."""
    first = words.split()[0]
    shape = {"crosses": "cross", "cross": "cross"}.get(first, first.removesuffix("s"))
    return [thing for thing in scene["objects"] if first == thing["color"] or shape == thing["shape"]]


def holds(line: dict) -> bool:
    """The sentence read from its words, by another way than it was made."""
    left, right = (BY_ID[name] for name in line["image_ids"])
    said = line["question"]
    if line["kind"] == "more":
        words, side = said.removeprefix("there are more ").removesuffix(" picture").split(" in the ")
        more, fewer = (left, right) if side == "left" else (right, left)
        return len(things(more, words)) > len(things(fewer, words))
    words = re.split(r" (?:show an?|has an?|hold \w+|number of) ", said)[1]
    found = [things(left, words), things(right, words)]
    assert all(thing["hidden"] <= HIDDEN_MOST for side in found for thing in side)
    counts = [len(side) for side in found]
    if line["kind"] == "together":
        return sum(counts) == NUMBERS.index(said.split()[5])
    return {"both": min(counts) > 0, "one": counts.count(0) == 1, "same": counts[0] == counts[1]}[line["kind"]]


def test_every_statement_is_as_true_as_it_says() -> None:
    assert len(LINES) > 2 * len(SCENES) and {line["kind"] for line in LINES} == set(KINDS)
    for line in LINES:
        assert line["answers"] == [str(holds(line)).lower()], line
        assert line["image_ids"][0] != line["image_ids"][1]


def test_each_sentence_has_two_true_and_two_false_pairs() -> None:
    sets = defaultdict(list)
    for line in LINES:
        sets[line["set"]].append(line)
    for lines in sets.values():
        assert len({line["question"] for line in lines}) == 1
        assert len({tuple(line["image_ids"]) for line in lines}) == 4
        assert Counter(line["answers"][0] for line in lines) == {"true": 2, "false": 2}
        for line in lines:  # a twin: one picture and the answer differ
            assert any(other["answers"] != line["answers"] and sum(map(str.__eq__, other["image_ids"],
                       line["image_ids"])) == 1 for other in lines)


def test_no_sentence_and_no_picture_gives_itself_away() -> None:
    sentence, left, right = blind(LINES)
    assert sentence == 0.5 and left < 0.68 and right < 0.68
    crossed = [line for line in LINES if line["kind"] in ("one", "same")]
    assert max(blind(crossed)) < 0.56
    assert blind([]) == (0.0, 0.0, 0.0)


def test_a_longer_split_begins_with_the_same_statements() -> None:
    short = state(SCENES[: 3 * BLOCK])
    assert short == LINES[: len(short)] and len(short) > BLOCK


def test_a_split_of_few_scenes_has_few_statements_or_none() -> None:
    assert state([]) == state(SCENES[:1]) == []
    assert all(set(line["image_ids"]) <= set(list(BY_ID)[:4]) for line in state(SCENES[:4]))


def test_a_folder_from_before_gets_its_statements_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ScenesConfig(out=tmp_path, train=6, val=0, test=0, seed=5, workers=1)
    scenes(config)
    path = tmp_path / "train_statements.jsonl"
    written = path.read_bytes()
    truth = [json.loads(line) for line in (tmp_path / "train_scenes.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in written.splitlines()] == state(truth) != []
    assert "statements, a blind guess is right in 50.0%" in capsys.readouterr().out
    path.unlink()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    scenes(config)
    assert path.read_bytes() == written
    assert all(file.read_bytes() == content for file, content in before.items())
