"""Damage of every kind in a folder of shards: what reads it answers with a sentence, never with other data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from opt.config import UserError
from opt.data.manifest import read_manifest, read_receipt, write_manifest
from opt.data.record import Narration, Picture, Record, RecordError, check
from opt.data.shards import ShardReader, ShardWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three records, each with two narrations."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(tmp_path, f"{shard:05d}") as writer:
            for number in range(3):
                told = Narration("0", f"Cube {number}.", rng.standard_normal((5, 6)).astype(np.float16), 12.5, 0.4)
                writer.write(Record(f"k{shard}{number}", (Picture(64, 48),), (told, Narration("1", "Again."))))
    write_manifest(tmp_path, ["00000", "00001"], {}, (), 0)
    return tmp_path


def read_all(folder: Path) -> None:
    """Everything that a reader answers."""
    reader = ShardReader(folder)
    assert len(reader.lengths) == len(reader.key_hash) == len(list(reader.keys())) == len(list(reader.captions()))
    for number in range(len(reader)):
        reader.record(number, jpeg=True)
        reader.sample(number)


def test_every_flipped_byte_of_an_index_is_found_when_it_is_opened(folder: Path) -> None:
    path = folder / "00001.npy"
    content = path.read_bytes()
    read_all(folder)
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with pytest.raises(UserError, match="00001.npy"):
            read_all(folder)


@pytest.mark.parametrize("size", [0, 5, 200])
def test_an_index_cut_short_is_a_sentence(folder: Path, size: int) -> None:
    os.truncate(folder / "00000.npy", size)
    with pytest.raises(UserError, match="00000.npy"):
        read_all(folder)


def test_another_shards_files_are_not_taken_for_this_ones(folder: Path) -> None:
    for kind in ("tar", "npy", "json"):
        shutil.copy(folder / f"00000.{kind}", folder / f"00001.{kind}")
    with pytest.raises(UserError, match="00001.npy"):
        read_all(folder)
    assert read_receipt(folder, "00000") is not None and read_receipt(folder, "00001") is None


def test_no_flipped_byte_of_a_tar_escapes_as_anything_but_a_sentence(folder: Path) -> None:
    path = folder / "00000.tar"
    content = path.read_bytes()
    rows = np.load(folder / "00000.npy")
    for place in range(int(rows["offset"][2]), int(rows["offset"][2] + rows["size"][2])):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        with pytest.raises(UserError, match="00000.tar.*'k01'"):
            read_all(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '{"name": "00000"}', "\udcff"])
def test_a_receipt_that_is_none_counts_as_missing(folder: Path, content: str) -> None:
    (folder / "00000.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_receipt(folder, "00000") is None


@pytest.mark.parametrize(("name", "value"), [("failures", 5), ("totals", []), ("records", "3"), ("failures", [7])])
def test_a_receipt_with_values_of_another_kind_counts_as_missing(folder: Path, name: str, value: object) -> None:
    path = folder / "00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert read_receipt(folder, "00000") is None


def test_a_folder_of_something_else_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no shards"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        Record("k" * 201, (Picture(1, 1),)),
        Record("half\ud800", (Picture(1, 1),)),
        Record("a", (), (Narration("0", "half \ud800"),)),
        Record("a", (), (Narration("\udfff", "whole"),)),
    ],
)
def test_names_and_texts_that_no_file_can_hold_are_refused(record: Record) -> None:
    with pytest.raises(RecordError):
        check(record)
