"""The published layout, with everything that real files do to it."""

import json

import pytest

from feature_extract.sources.item import BadRow, Item
from feature_extract.sources.localized_narratives import read
from opt.config import UserError


def line(image_id="a", caption="A dog.", recording="train/a.ogg", **more) -> str:
    return json.dumps({"image_id": image_id, "annotator_id": 7, "caption": caption, "voice_recording": recording,
                       "timed_caption": [], "traces": [[{"x": 2.0, "y": -1.0, "t": 0.0}]], **more}) + "\n"


def test_lines_of_one_picture_become_one_item_in_order_of_first_appearance(tmp_path):
    (tmp_path / "train_localized_narratives-00000-of-00002.jsonl").write_text(line("b") + line("a", "First ."))
    (tmp_path / "train_localized_narratives-00001-of-00002.jsonl").write_text(line("c") + line("a", "Second ."))
    (tmp_path / "val_localized_narratives.jsonl").write_text(line("z"))
    items = list(read(tmp_path, "train"))
    assert [item.key for item in items] == ["b", "a", "c"]
    assert [narration.caption for narration in items[1].narrations] == ["First .", "Second ."]
    assert items[1].pictures == (tmp_path / "images" / "a.jpg",)
    assert items[1].narrations[0].recording == tmp_path / "voice" / "train" / "a.ogg"
    assert items[1].narrations[0].narration_id == "7"


@pytest.mark.parametrize(
    "bad",
    [
        b"{not json\n", b"\xff\xfe\x00\n", b"[1, 2]\n", b"null\n", b'{"caption": "no picture"}\n',
        b'{"image_id": "a"}\n', b'{"image_id": 3, "caption": "x"}\n', b'{"image_id": " ", "caption": "x"}\n',
        line("../../secret").encode(), line("/etc/passwd").encode(), line(recording="../voice.ogg").encode(),
        line(caption=None).encode(), line(recording=5).encode(), b"[" * 100_000 + b"\n",
        line("half\ud800").encode(), line(caption="half \ud800").encode(), line(recording="\udfff.ogg").encode(),
        line(annotator_id="\ud83d").encode(),
    ],
)
def test_a_malformed_line_keeps_its_place(tmp_path, bad):
    path = tmp_path / "train_localized_narratives.jsonl"
    path.write_bytes(line("a").encode() + bad + b"\n" + line("b").encode())
    first, broken, last = read(tmp_path, "train")
    assert isinstance(first, Item) and isinstance(last, Item) and isinstance(broken, BadRow)
    assert broken.key == "train_localized_narratives.jsonl:2"
    assert broken.reason.startswith("malformed line (")


def test_no_recording_and_ids_with_dots(tmp_path):
    (tmp_path / "train_localized_narratives.jsonl").write_text(line("a.b", recording=None))
    (item,) = read(tmp_path, "train")
    assert item.key == "a-b" and item.pictures[0].name == "a.b.jpg" and item.narrations[0].recording is None


def test_an_unknown_split_names_those_there_are(tmp_path):
    (tmp_path / "val_localized_narratives.jsonl").write_text(line())
    with pytest.raises(UserError, match="it has the splits val"):
        list(read(tmp_path, "train"))


@pytest.mark.parametrize("split", ["*", "t?ain", "[t]rain", "**", "/", "../corpus/train"])
def test_a_split_is_a_name_and_not_a_pattern(tmp_path, split):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train_localized_narratives.jsonl").write_text(line())
    with pytest.raises(UserError, match="split"):
        list(read(corpus, split))
