"""Labels in texts: what counts as naming an object."""

import json

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


def test_captions_of_spoken_scenes_name_exactly_the_objects_that_they_mention():
    from feature_extract.sources.scene_drawing import COLORS, SHAPES
    from feature_extract.sources.spoken_scenes import draw

    finder = LabelFinder(f"{color} {shape}" for color in COLORS for shape in SHAPES)
    for index in range(100):
        scene = draw(0, index)
        for telling in scene.tellings:
            said = {thing.label for thing, there in zip(scene.objects, telling.caption.mentioned, strict=True) if there}
            assert finder.find(telling.caption.sentence) == said, telling.caption.text


def test_labels_are_read_by_key_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"image_id": "a.b", "labels": ["red circle"]}) + "\n")
    assert read_labels(path) == {"a-b": {"red circle"}}
    path.write_bytes(b'\xef\xbb\xbf{"image_id": "a", "labels": []}\r\n\n{"image_id": "b", "labels": ["dog"]}\n\n')
    assert read_labels(path) == {"a": frozenset(), "b": {"dog"}}
    bad = [b'{"image_id": "a"}', b'{"image_id": 3, "labels": []}', b"\xff", b"[]"]
    bad += [b'{"image_id": "a", "labels": %s}' % labels for labels in (b'"red circle"', b"[1]", b'{"dog": 1}', b"null",
                                                                     b'["\\ud800"]')]
    for line in bad:
        path.write_bytes(b'{"image_id": "z", "labels": []}\n' + line + b"\n")
        with pytest.raises(UserError, match="line 2"):
            read_labels(path)
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="holds no labels"):
        read_labels(path)
    with pytest.raises(UserError, match="does not exist"):
        read_labels(tmp_path / "none.jsonl")
