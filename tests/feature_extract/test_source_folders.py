"""A plain folder, and a folder a class."""

import json
import os
from pathlib import Path

import pytest

from eval.naming import read_labels
from feature_extract.sources import class_folders, folder
from feature_extract.sources.item import BadRow, Item, NarrationItem
from opt.config import UserError


def touch(top, *names):
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_files_of_one_name_are_a_record(tmp_path):
    touch(tmp_path, "b/z.JPG", "b/a.png", "b/a.wav", "a.flac", "b/deep/er/x.y.jpeg", "b/.hidden.jpg", ".git/c.jpg",
          "notes.md", "b/a.jpg.bak", "b/ab.jpg")  # fmt: skip
    (tmp_path / "b" / "a.txt").write_text("A dog.\n\nSecond caption. \n")
    (tmp_path / "words.txt").write_text("Words alone.")
    source = folder.Source(tmp_path)
    assert list(source.rows()) == [
        Item("a", (), (NarrationItem("0", None, "a.flac"),)),
        Item("words", (), (NarrationItem("0", "Words alone."),)),
        Item("b-a", ("b/a.png",), (NarrationItem("0", "A dog.", "b/a.wav"), NarrationItem("1", "Second caption."))),
        Item("b-ab", ("b/ab.jpg",)),
        Item("b-z", ("b/z.JPG",)),
        Item("b-deep-er-x-y", ("b/deep/er/x.y.jpeg",)),
    ]
    expected = [".", "words.txt", "b", "b/a.txt", "b/deep", "b/deep/er"]
    assert [path.relative_to(tmp_path).as_posix() for path in source.files()] == expected
    assert [row.key for row in folder.Source(tmp_path, "b").rows()][0] == "b-a"


def test_a_subfolder_called_train_is_the_split(tmp_path):
    touch(tmp_path, "train/1.jpg", "val/2.jpg")
    assert [row.pictures for row in folder.Source(tmp_path).rows()] == [("train/1.jpg",)]
    assert [row.key for row in folder.Source(tmp_path, "val").rows()] == ["val-2"]
    with pytest.raises(UserError, match="there are train, val"):
        folder.Source(tmp_path, "test").files()
    with pytest.raises(UserError, match="is not a folder"):
        folder.Source(tmp_path / "none").files()
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no pictures, captions or recordings"):
        list(folder.Source(tmp_path / "bare").rows())


def test_broken_captions_and_names_are_named(tmp_path):
    touch(tmp_path, "a.jpg", "c.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\n")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    with open(os.fsencode(tmp_path) + b"/d\xff.jpg", "wb"):
        pass
    rows = list(folder.Source(tmp_path).rows())
    assert [row.key for row in rows] == ["a", "c", "d\\udcff", "pipe"] and all(isinstance(row, BadRow) for row in rows)


def test_a_subfolder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        list(folder.Source(tmp_path).rows())


def test_classes_become_captions(tmp_path):
    touch(tmp_path, "train/n01440764/n01440764_10026.JPEG", "train/n01440764/sub/x.png", "train/n07742313/a.jpg",
          "train/n07742313/readme.txt", "train/loose.jpg", "val/n01440764/v.JPEG")  # fmt: skip
    names = tmp_path / "LOC_synset_mapping.txt"
    names.write_text("n01440764 tench, Tinca tinca\nn07742313 Granny Smith\n")
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}.\n\nA {}, a {}!\n")
    source = class_folders.Source(tmp_path, names=names, templates=templates, captions="all")
    both = (NarrationItem("0", "a photo of a tench."), NarrationItem("1", "A tench, a tench!"))
    assert list(source.rows())[:2] == [
        Item("train-n01440764-n01440764_10026", ("train/n01440764/n01440764_10026.JPEG",), both),
        Item("train-n01440764-sub-x", ("train/n01440764/sub/x.png",), both),
    ]
    assert [row.key for row in source.rows()][2:] == ["train-n07742313-a"]
    assert source.files()[:2] == [names, templates]
    one = list(class_folders.Source(tmp_path, names=names).rows())
    assert one == list(class_folders.Source(tmp_path, names=names).rows())
    assert all(len(row.narrations) == 1 and row.narrations[0].caption in
               [class_folders.fill(template, "tench") for template in class_folders.TEMPLATES] for row in one[:2])
    assert [row.key for row in class_folders.Source(tmp_path, "val", names=names).rows()] == ["val-n01440764-v"]


def test_folders_called_what_they_hold_and_open_images_names(tmp_path):
    touch(tmp_path, "hot_dog/1.jpg", "apple/1.jpg", "m_011k07/1.jpg")
    templates = tmp_path / "templates"
    templates.write_text("A {} or a {}")
    rows = class_folders.Source(tmp_path, templates=templates).rows()
    assert [row.narrations[0].caption for row in rows] == ["An apple or an apple", "A hot dog or a hot dog",
                                                           "A m 011k07 or a m 011k07"]  # fmt: skip
    names = tmp_path / "class-descriptions.csv"
    names.write_text("/m/011k07,Tortoise\n/m/0k4j,Car\n")
    *nameless, tortoise = class_folders.Source(tmp_path, names=names, templates=templates).rows()
    assert tortoise.narrations[0].caption == "A Tortoise or a Tortoise"
    assert [row.reason for row in nameless] == [
        f"malformed line (ValueError: no name for the class {name!r})" for name in ("apple", "hot_dog")]


def test_all_templates_are_drawn_about_equally(tmp_path):
    touch(tmp_path, *(f"dog/{number}.jpg" for number in range(700)))
    counts = {}
    for row in class_folders.Source(tmp_path).rows():
        counts[row.narrations[0].caption] = counts.get(row.narrations[0].caption, 0) + 1
    assert len(counts) == len(class_folders.TEMPLATES) and min(counts.values()) > 60


@pytest.mark.parametrize(("option", "content"), [("names", b"n01440764\n"), ("names", b"\xff a\n"), ("names", None),
                                                 ("templates", b"a photo\n"), ("templates", b"")])  # fmt: skip
def test_settings_files_that_are_wrong_are_sentences(tmp_path, option, content):
    touch(tmp_path, "corpus/dog/1.jpg")
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="file"):
        list(class_folders.Source(tmp_path / "corpus", **{option: tmp_path / "file"}).rows())


def test_the_class_of_every_picture_is_its_label(tmp_path):
    touch(tmp_path, "train/n01440764/a.b.JPEG", "train/n07742313/x.png", "train/unnamed/x.png", "val/n01440764/v.JPEG")
    names = tmp_path / "names.txt"
    names.write_text("n01440764 tench, Tinca tinca\nn07742313 Granny Smith\n")
    source = class_folders.Source(tmp_path, names=names)
    assert list(source.labels()) == [
        {"image_id": "train-n01440764-a-b", "labels": ["tench"]},
        {"image_id": "train-n07742313-x", "labels": ["Granny Smith"]},
    ]
    assert [line["image_id"] for line in source.labels()] == [row.key for row in source.rows() if isinstance(row, Item)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in source.labels()))
    assert read_labels(path) == {"train-n01440764-a-b": {"tench"}, "train-n07742313-x": {"Granny Smith"}}
