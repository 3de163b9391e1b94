"""Labels in texts: what counts as naming an object."""

import json

import numpy as np
import pytest

from eval.naming import LabelFinder, read_labels
from opt.config import UserError

SCENES = LabelFinder(["red circle", "blue square", "red cross", "green star", "yellow ring"])


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a red circle", {"red circle"}),
        ("Two small red striped circles.", {"red circle"}),
        ("there are three huge red crosses", {"red cross"}),
        ("a red star left of a blue circle", set()),  # right words, wrong pairs
        ("a red ring and a circle", set()),
        ("a large dotted blue square in front of a green star", {"blue square", "green star"}),
        ("red, circle", set()),
        ("", set()),
    ],
)
def test_colour_and_shape_must_belong_to_one_noun(text, labels):
    assert SCENES.find(text) == labels


def test_the_most_specific_label_wins():
    finder = LabelFinder(["dog", "hot dog", "dining table", "diamond", "diamond ring", "berry"])
    assert finder.find("a hot dog on a wooden dining table") == {"hot dog", "dining table"}
    assert finder.find("two dogs with a diamond ring and berries") == {"dog", "diamond", "diamond ring", "berry"}


def test_every_object_that_the_grammar_mentions_is_found():
    captions = pytest.importorskip("feature_extract.sources.scene_captions")
    from feature_extract.sources.scene_drawing import COLORS, SHAPES

    finder = LabelFinder(f"{color} {shape}" for color in COLORS for shape in SHAPES)
    random = np.random.default_rng(0)
    for _ in range(200):
        color, shape = str(random.choice(list(COLORS))), str(random.choice(list(SHAPES)))
        phrases = [f"a large striped {color} {shape}", f"two {color} {captions._plural(shape)}"]
        assert all(finder.find(f"there are {phrase} next to a wall") == {f"{color} {shape}"} for phrase in phrases)


def test_labels_are_read_by_key_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"image_id": "a.b", "labels": ["red circle"]}) + "\n")
    assert read_labels(path) == {"a-b": {"red circle"}}
    path.write_text('{"image_id": "a"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_labels(path)
    with pytest.raises(UserError, match="does not exist"):
        read_labels(tmp_path / "none.jsonl")
