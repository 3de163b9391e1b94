"""The published layouts, with everything that real files do to them."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest

from feature_extract.sources.item import BadRow, Item, NarrationItem
from feature_extract.sources.localized_narratives import Source
from opt.config import UserError


def line(image_id="a", caption="A dog.", recording="train/a.ogg", **more) -> str:
    return json.dumps({"dataset_id": "of mine", "image_id": image_id, "annotator_id": 7, "caption": caption,
                       "timed_caption": [{"utterance": 'a "quoted" word', "start_time": 0.1, "end_time": 0.3}],
                       "traces": [[{"x": 2.0, "y": -1.0, "t": 0.0}]], "voice_recording": recording, **more}) + "\n"


def one(tmp_path: Path, split: str, content: str, **options) -> Item:
    (tmp_path / f"{split}_localized_narratives.jsonl").write_text(content)
    (item,) = Source(tmp_path, split, **options).rows()
    assert isinstance(item, Item)
    return item


def test_every_line_is_an_item_in_the_order_of_the_files(tmp_path):
    (tmp_path / "train_localized_narratives-00000-of-00002.jsonl").write_text(line("b") + line("a", "First ."))
    (tmp_path / "train_localized_narratives-00001-of-00002.jsonl").write_text(line("c") + "\n" + line("a", "Second ."))
    (tmp_path / "val_localized_narratives.jsonl").write_text(line("z"))
    source = Source(tmp_path)
    assert source.root == tmp_path
    assert [path.name for path in source.files()] == sorted(path.name for path in tmp_path.glob("train*"))
    items = list(source.rows())
    assert [item.key for item in items] == ["b", "a", "c", "a"]
    assert items[1].pictures == items[3].pictures == ("images/a.jpg",)
    assert items[3].narrations == (NarrationItem("7", "Second .", "voice/train/a.ogg"),)


@pytest.mark.parametrize(
    ("split", "image_id", "picture", "recording", "file"),
    [
        ("open_images_train_v6", "000b69a1c4d9e3a2", "train/000b69a1c4d9e3a2.jpg",
         "open_images_train_v6/open_images_train_v6_000b69a1c4d9e3a2_7.ogg", None),
        ("open_images_validation", "0001eeaf4aed83f9", "validation/0001eeaf4aed83f9.jpg",
         "open_images_validation/open_images_validation_0001eeaf4aed83f9_7.ogg", None),
        ("coco_val", "137576", "val2017/000000137576.jpg", "coco_val/coco_val_137576_7.ogg", None),
        ("coco_train", "9", "train2017/000000000009.jpg", "coco_train/coco_train_9_7.ogg", None),
        ("flickr30k_test", "1000092795", "flickr30k-images/1000092795.jpg",
         "flickr30k_test/flickr30k_test_1000092795_7.ogg", "flickr30k_test/flickr30k_test_0000001000092795_7.ogg"),
        ("ade20k_train", "ADE_train_00000001", "images/training/ADE_train_00000001.jpg",
         "ade20k_train/ade20k_train_ADE_train_00000001_7.ogg", "ade20k_train/ade20k_train_0000000000000001_7.ogg"),
        ("ade20k_validation", "ADE_val_00000012", "images/validation/ADE_val_00000012.jpg",
         "ade20k_validation/ade20k_validation_00000012_7.ogg",
         "ade20k_validation/ade20k_validation_0000000000000012_7.ogg"),
        ("holidays_train", "x", "images/x.jpg", "x_3_7.ogg", None),
    ],
)  # fmt: skip
def test_published_splits_find_their_pictures_and_recordings(tmp_path, split, image_id, picture, recording, file):
    item = one(tmp_path, split, line(image_id, recording=recording))
    assert item == Item(image_id, (picture,), (NarrationItem("7", "A dog.", f"voice/{file or recording}"),))


def test_layouts_and_places_can_be_said(tmp_path):
    content = line("9", recording="r.ogg")
    pictures = one(tmp_path, "train", content, layout="coco", pictures="https://a.b/coco/", recordings="https://a.b/v")
    assert pictures.pictures == ("https://a.b/coco/train2017/000000000009.jpg",)
    assert pictures.narrations[0].recording == "https://a.b/v/r.ogg"
    assert one(tmp_path, "coco_val", content, layout="plain", pictures="p").pictures == ("p/images/9.jpg",)
    (tmp_path / "coco_test_localized_narratives.jsonl").write_text(content)
    with pytest.raises(UserError, match="coco has train, val"):
        list(Source(tmp_path, "coco_test").rows())


@pytest.mark.parametrize(
    "bad",
    [
        b"{not json\n", b"\xff\xfe\x00\n", b"[1, 2]\n", b"null\n", b'{"caption": "no picture"}\n',
        b'{"image_id": "a"}\n', b'{"image_id": 3, "caption": "x"}\n', b'{"image_id": " ", "caption": "x"}\n',
        line(caption=None).encode(), line(recording=5).encode(), b"[" * 100_000 + b"\n",
        line("half\ud800").encode(), line(caption="half \ud800").encode(), line(recording="\udfff.ogg").encode(),
        line(annotator_id="\ud83d").encode(), line("a\0").encode(), line(caption="\xe9").encode()[:-40] + b"\n",
        line("a").encode()[:150] + line("b").encode(), line("a").encode()[:-1] + line("b").encode(),
        line(caption="caf\xe9").replace("\\u00e9", "\xe9").encode("latin-1"), b"\x80" * (1 << 25) + b"\n",
    ],
    ids=range(21),
)  # fmt: skip
def test_a_malformed_line_keeps_its_place(tmp_path, bad):
    path = tmp_path / "train_localized_narratives.jsonl"
    path.write_bytes(line("a").encode() + bad + line("b").encode())
    first, broken, last = Source(tmp_path).rows()
    assert isinstance(first, Item) and isinstance(last, Item) and isinstance(broken, BadRow)
    assert broken.key == "train_localized_narratives.jsonl:2"
    assert broken.reason.startswith("malformed line (")
    broken.reason.encode()


def test_fields_in_another_order_or_with_their_names_in_the_caption_are_read_all_the_same(tmp_path):
    swapped = json.dumps({"voice_recording": "r.ogg", "timed_caption": [{"voice_recording": 1}], "annotator_id": 7,
                          "caption": "Late.", "image_id": "a"})
    assert one(tmp_path, "train", swapped).narrations == (NarrationItem("7", "Late.", "voice/r.ogg"),)
    nasty = 'A "timed_caption" and a "voice_recording": "x.ogg"'
    assert one(tmp_path, "train", line(caption=nasty)).narrations[0].caption == nasty
    nested = json.dumps({"caption": "In.", "more": {"timed_caption": 0}, "image_id": "a", "voice_recording": ""})
    assert one(tmp_path, "train", nested).narrations == (NarrationItem("", "In.", None),)


def test_no_recording_and_ids_with_dots(tmp_path):
    item = one(tmp_path, "train", line("a.b", recording=None))
    assert item.key == "a-b" and item.pictures == ("images/a.b.jpg",) and item.narrations[0].recording is None


def test_an_unknown_split_names_those_there_are(tmp_path):
    (tmp_path / "val_localized_narratives.jsonl").write_text(line())
    with pytest.raises(UserError, match="it has the splits val"):
        list(Source(tmp_path).rows())


@pytest.mark.parametrize("split", ["*", "t?ain", "[t]rain", "**", "/", "../corpus/train", ""])
def test_a_split_is_a_name_and_not_a_pattern(tmp_path, split):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train_localized_narratives.jsonl").write_text(line())
    with pytest.raises(UserError, match="split"):
        list(Source(corpus, split).rows())


def test_a_large_file_is_streamed_and_its_traces_are_not_parsed(tmp_path):
    traces = json.dumps([[{"x": 0.5, "y": 0.5, "t": 0.1}] * 40])
    with (tmp_path / "train_localized_narratives.jsonl").open("w") as file:
        for number in range(50_000):
            file.write(f'{{"image_id": "{number}", "annotator_id": 1, "caption": "A dog.", "timed_caption": [], '
                       f'"traces": {traces}, "voice_recording": "{number}.ogg"}}\n')
    source, began = Source(tmp_path), time.perf_counter()
    assert sum(1 for _ in source.rows()) == 50_000
    assert time.perf_counter() - began < 5, "50,000 short lines take a third of a second on an idle core"
    tracemalloc.start()
    for _ in source.rows():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
