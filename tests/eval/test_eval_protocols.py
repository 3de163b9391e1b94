"""Named ways to search: which samples are kept, which fold they are in, and splits that are not the protocol's."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from eval.protocols import PROTOCOLS, Protocol
from eval.task import Split
from feature_extract.sources import karpathy
from opt.config import UserError

FOUR = Protocol("four", 4, 2, 2, 3, "", "opt extract four")


class Row(NamedTuple):
    key: str
    text: bool = True
    image: bool = True
    audio: bool = True


def rows(pictures: str, narrations: int) -> list[Row]:
    return [Row(key) for key in pictures for _ in range(narrations)]


def split_of(told: list[Row]) -> Split:
    split = Split.__new__(Split)
    split.reader = SimpleNamespace(place="shards")
    split.keys = [row.key for row in told]
    split.groups = np.unique(split.keys, return_inverse=True)[1]
    split.has = {name: np.array([getattr(row, name) for row in told]) for name in ("text", "image", "audio")}
    return split


def test_the_first_captions_of_each_picture_are_kept_in_their_order():
    assert FOUR.narrow(split_of(rows("dacb", 3))).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]


def test_a_sample_without_words_is_no_caption_and_one_without_a_picture_no_picture():
    told = [Row("x", image=False), Row("x", image=False), *rows("dacb", 3)]
    told[2] = Row("d", text=False)
    assert FOUR.narrow(split_of(told)).tolist() == [3, 4, 5, 6, 8, 9, 11, 12]


def test_folds_are_runs_of_pictures_in_the_order_of_the_split():
    split = split_of(rows("dacb", 3))
    assert FOUR.folds_of(split).tolist() == [0] * 6 + [1] * 6, "not by the alphabet of keys"
    assert FOUR.folds_of(split).dtype == np.int64 and len(FOUR.folds_of(split)) == len(split)
    lone = Row("x", image=False)
    assert FOUR.folds_of(split_of([lone, *rows("dacb", 3), lone])).tolist() == [0] * 7 + [1] * 7
    assert not dataclasses.replace(FOUR, folds=1).folds_of(split).any()


def test_of_one_narration_a_picture_a_spoken_one_is_taken():
    one = Protocol("one", 4, 1, 1, 3, "", "opt shards split")
    told = rows("dacb", 2)
    told[2] = Row("a", audio=False)
    assert one.narrow(split_of(told)).tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize(
    ("told", "said"),
    [(rows("abc", 2), r"4 pictures .* shards has 3; extract it whole with `opt extract four`"),
     (rows("abcde", 2), "has 5"), (rows("abcd", 1), "4 of 4 pictures of shards have fewer"),
     (rows("abcd", 2)[:-1], "1 of 4 pictures"), ([Row(key, text=False) for key in "aabbccdd"], "has 0")],
)
def test_another_split_gives_no_figure(told, said):
    with pytest.raises(UserError, match=said):
        FOUR.narrow(split_of(told))


def test_the_published_protocols_are_whole():
    assert list(PROTOCOLS) == ["coco-5k", "coco-1k", "flickr30k", "openimages-5k"]
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.pictures % protocol.folds == 0
    assert (PROTOCOLS["coco-1k"].pictures, PROTOCOLS["coco-1k"].folds, PROTOCOLS["flickr30k"].rerank) == (5000, 5, 128)


def test_karpathys_test_split_keeps_the_files_order_of_pictures_and_sentences(tmp_path: Path):
    """As dataset_coco.json has it: splits in turns, "sentids" not sorted, six captions for some."""
    images = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg", "cocoid": number, "split": part,
         "sentids": [], "sentences": [{"raw": f"{number} {place}", "sentid": 100 * number - place}
                                      for place in range(6 if number == 9 else 5)]}
        for number, part in ((42, "train"), (9, "test"), (7, "val"), (3, "test"), (8, "restval"), (5, "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = list(karpathy.Source(tmp_path, "test").rows())
    assert [row.key for row in found] == ["9", "3", "5"]
    assert found[0].pictures == ("val2014/COCO_val2014_000000000009.jpg",)
    assert [narration.caption for narration in found[0].narrations] == [f"9 {place}" for place in range(6)]
    captions = [narration.caption for row in found for narration in row.narrations]
    split = split_of([Row(row.key) for row in found for _ in row.narrations])
    three = Protocol("three", 3, 5, 3, 3, "", "")
    kept = three.narrow(split)
    assert [captions[n] for n in kept] == [f"{key} {place}" for key in (9, 3, 5) for place in range(5)]
    assert three.folds_of(split)[kept].tolist() == [0] * 5 + [1] * 5 + [2] * 5
