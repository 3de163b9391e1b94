"""Every source on real data of its layout, and what all sources have in common."""

import ast
import dataclasses
import importlib
import inspect
import os
import pkgutil
from pathlib import Path

import pytest

from feature_extract import sources
from feature_extract.sources import class_folders, coco_captions, flickr_audio, folder, localized_narratives, table
from feature_extract.sources import transcripts as transcripts_source
from feature_extract.sources.item import Item

DATA = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
REAL = [
    (lambda data: localized_narratives.Source(data / "flickr-speech"), 800),
    (lambda data: localized_narratives.Source(data / "flickr-speech", "test"), 100),
    (lambda data: localized_narratives.Source(data / "narrations"), 22),
    (lambda data: coco_captions.Source(data / "coco-cc"), 119),
    (lambda data: flickr_audio.Source(data / "flickr-speech"), 5000),
    (lambda data: table.Source(data / "flickr-speech/captions.csv", folder=data / "flickr-speech/images"), 5000),
    (lambda data: transcripts_source.Source(data / "librispeech"), 100),
    (lambda data: folder.Source(data / "coco-cc" / "images"), 119),
    (lambda data: folder.Source(data / "librispeech" / "flac"), 100),
]


@pytest.mark.parametrize("number", range(len(REAL)))
def test_real_rows_lead_to_real_files(number):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent")
    make, count = REAL[number]
    source = make(DATA)
    rows = list(source.rows())
    assert len(rows) == count and all(isinstance(row, Item) for row in rows)
    assert all(path.exists() for path in source.files())
    for row in rows:
        for path in (*row.pictures, *(one.recording for one in row.narrations if one.recording)):
            assert (source.root / path).is_file()
    assert any(row.pictures or row.narrations[0].recording for row in rows)


def test_open_images_names_name_classes(tmp_path):
    names = DATA / "vocab" / "open-images-class-descriptions-boxable.csv"
    if not names.is_file():
        pytest.skip(f"{names} is absent")
    (tmp_path / "m-011k07").mkdir()
    (tmp_path / "m-011k07" / "1.jpg").write_bytes(b"")
    (row,) = class_folders.Source(tmp_path, names=names).rows()
    assert isinstance(row, Item) and "Tortoise" in (row.narrations[0].caption or "")


def modules():
    names = [entry.name for entry in pkgutil.iter_modules(sources.__path__)]
    loaded = (importlib.import_module(f"{sources.__name__}.{name}") for name in names if name != "item")
    return [module for module in loaded if hasattr(module, "Source")]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_source_is_one_dataclass_whose_options_say_what_they_are(module):
    kind = module.Source
    fields = dataclasses.fields(kind)
    assert kind.__dataclass_params__.frozen and [field.name for field in fields[:2]] == ["corpus", "split"]
    assert fields[1].default == "train"
    body = ast.parse(inspect.getsource(kind)).body[0].body
    for number, statement in enumerate(body):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(body[number + 1], ast.Expr), f"{statement.target.id} has no docstring"
    hash(kind(Path("x")))
