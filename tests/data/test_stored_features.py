"""The optional fields, int8 storage, and records taken over from one shard into another."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_records import full_narration, full_picture, full_record, noise_jpeg, records_of, same, write_folder

from opt.config import UserError
from opt.data.encoding import decode, dequantise, encode, quantise
from opt.data.manifest import read_receipt, write_manifest
from opt.data.record import Narration, Record, RecordError, check
from opt.data.shards import ShardReader, ShardWriter
from opt.data.stored import DamagedRecord, StoredShard

STORED = [full_record("a", 0), full_record("b", 1, pictures=3, narrations=2), full_record("c", 2, jpeg=False)]


def test_every_field_comes_back(tmp_path: Path) -> None:
    reader = write_folder(tmp_path, [STORED[:2], STORED[2:]])
    assert same(records_of(reader), STORED)
    assert (reader.manifest.region_attributes, reader.manifest.speech_codebooks) == (("red", "blue"), (7, 9))
    assert reader.manifest.storage == "float16"


def test_the_codes_of_the_narration_chosen_reach_the_sample(tmp_path: Path) -> None:
    reader = write_folder(tmp_path, [STORED[:2], STORED[2:]])
    for number, told in enumerate(told for record in STORED for told in record.narrations):
        sample = reader.sample(number)
        assert sample.narration_id == told.narration_id and sample.speech_codes is not None
        np.testing.assert_array_equal(sample.speech_codes, told.codes)
        assert len(sample.speech_codes) == len(sample.speech)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_classes": None}, "top_classes and top_scores come together"),
        ({"attribute_scores": None}, "attributes and attribute_scores come together"),
        ({"regions": None, "boxes": None, "classes": None, "scores": None}, "and with regions"),
        ({"top_scores": np.zeros((3, 3), np.float16)}, r"top_scores: shape must be \(3, 4\)"),
        ({"top_classes": np.zeros((2, 4), np.int16)}, r"top_classes: shape must be \(3, None\)"),
        ({"top_classes": np.zeros((3, 4), np.int64)}, "top_classes: dtype must be int16"),
        ({"top_scores": np.full((3, 4), 1.5, np.float16)}, r"top_scores: must lie in \[0, 1\]"),
        ({"attribute_scores": np.full((3, 2), np.nan, np.float16)}, "attribute_scores: holds NaN"),
        ({"attributes": np.full((3, 2), -1, np.int16)}, "attributes: must not be negative"),
        ({"top_classes": np.zeros((3, 0), np.int16), "top_scores": np.zeros((3, 0), np.float16)}, "without a column"),
        ({"jpeg": b""}, "no bytes must be absent"),
    ],
)
def test_pictures_that_break_the_contract_are_refused(change: dict[str, Any], message: str) -> None:
    picture = dataclasses.replace(full_picture(np.random.default_rng(0)), **change)
    with pytest.raises(RecordError, match=message):
        check(Record("k", (picture,)))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((4, 2), np.int16), r"shape must be \(5, None\)"),
        (np.zeros((5, 2), np.int32), "dtype must be int16"),
        (np.full((5, 2), -1, np.int16), "must not be negative"),
        (np.zeros((5, 0), np.int16), "without a column"),
    ],
)
def test_speech_codes_that_break_the_contract_are_refused(codes: np.ndarray, message: str) -> None:
    told = dataclasses.replace(full_narration(np.random.default_rng(0), 0), codes=codes)
    with pytest.raises(RecordError, match=message):
        check(Record("k", (), (told,)))
    with pytest.raises(RecordError, match="codes come with speech"):
        check(Record("k", (), (Narration("0", "Words.", codes=np.zeros((5, 2), np.int16)),)))


def test_int8_is_off_by_half_a_step_and_by_what_float16_rounds() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(300) * 10.0**power for power in range(-7, 5)]
    rows += [np.zeros(300), np.eye(300)[0] * 6e-8, np.full(300, 65504.0), -np.arange(300.0)]
    features = np.stack(rows).clip(-65504, 65504).astype(np.float16)
    with np.errstate(all="raise"):
        steps, scale = quantise(features)
    assert steps.dtype == np.int8 and scale.dtype == np.float32 and (np.abs(steps.astype(int)).max(1)[:12] == 127).all()
    read = dequantise(steps, scale)
    assert read.dtype == np.float16 and np.isfinite(read).all()
    rounding = np.maximum(np.abs(features).max(1).astype(np.float64) * 2**-11, 2.0**-25)
    error = np.abs(read.astype(np.float64) - features.astype(np.float64)).max(1)
    assert (error <= scale.astype(np.float64) / 2 * (1 + 1e-6) + rounding).all()
    assert (read[12] == 0).all()
    largest = np.abs(features).max(1)
    assert np.array_equal(np.abs(read).max(1), largest)  # a row's largest value keeps its place on the scale


def test_int8_halves_the_features_and_leaves_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    record = Record("k", (full_picture(rng, 36, width=1024),), (full_narration(rng, 0, 256),))
    assert len(encode(record, int8=True)) < 0.6 * len(encode(record))
    back = decode(bytearray(encode(record, int8=True)), None)
    other = dataclasses.replace(record.pictures[0], regions=back.pictures[0].regions)
    assert same(back.pictures[0], other) and not same(other, record.pictures[0])
    assert back.pictures[0].regions is not None and back.pictures[0].regions.dtype == np.float16
    reader = write_folder(tmp_path, [STORED, [Record("empty", (full_picture(rng, 0),))]], int8=True)
    assert reader.manifest.storage == "int8" and {receipt.storage for receipt in reader.manifest.shards} == {"int8"}
    check(reader.record(len(reader) - 1))


FORKS = """
import os, signal, sys
from pathlib import Path
import torch
from opt.data.shards import ShardReader
torch.set_num_threads(2)
torch.randn(10**6).exp()  # starts the threads, which a fork does not take along
reader = ShardReader(Path(sys.argv[1]))
child = os.fork()
signal.alarm(30)
reader.sample(0)
os._exit(0) if child == 0 else sys.exit(os.waitpid(child, 0)[1])
"""


def test_int8_is_read_after_a_fork(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    record = Record("k", (full_picture(rng, 36, width=1024),), (full_narration(rng, 0, 300),))
    write_folder(tmp_path, [[record]], int8=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORKS, tmp_path], check=True, timeout=60, env=environment)


def test_the_highest_frame_rate_counts_written_and_taken_over(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    told = [dataclasses.replace(full_narration(rng, n), frame_rate=rate) for n, rate in enumerate((5.0, 20.0, 10.0))]
    words = Narration("w", "Only words.", frame_rate=99.0)
    reader = write_folder(tmp_path / "a", [[Record("k", (), (*told, words)), Record("l", (), (told[0],))]])
    assert reader.manifest.frame_rate == 20.0
    with StoredShard(tmp_path / "a", reader.manifest.shards[0]) as shard:
        for place, rate in ((0, 20.0), (1, 5.0)):
            with ShardWriter(tmp_path / "b", "00000") as writer:
                writer.copy(shard, place)
            assert writer.receipt.frame_rate == rate


def test_a_folder_has_one_storage(tmp_path: Path) -> None:
    write_folder(tmp_path, [STORED[:1]])
    with ShardWriter(tmp_path, "00001", int8=True) as shard:
        shard.write(STORED[1])
    with pytest.raises(UserError, match="disagree on storage"):
        write_manifest(tmp_path, ["00000", "00001"], {}, (), 0)


@pytest.mark.parametrize("int8", [False, True])
def test_records_taken_over_are_the_same_bytes(tmp_path: Path, int8: bool) -> None:
    long = full_record("k" * 150, 5, pictures=2)
    third = dataclasses.replace(long, key="d", pictures=(full_picture(np.random.default_rng(7)), *long.pictures))
    stored = [*STORED, long, third]
    write_folder(tmp_path / "whole", [stored], int8)
    (tmp_path / "whole" / "manifest.json").unlink()
    receipt = read_receipt(tmp_path / "whole", "00000")
    assert receipt is not None
    with StoredShard(tmp_path / "whole", receipt) as shard:
        assert shard.keys == [record.key for record in stored]
        with ShardWriter(tmp_path / "copied", "00000", int8) as writer:
            for key in shard.keys:
                writer.copy(shard, shard.keys.index(key))
        for kind in ("tar", "npy", "json"):
            name = f"00000.{kind}"
            assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        write_folder(tmp_path / "fewer", [[stored[3], stored[1]]], int8)
        with ShardWriter(tmp_path / "picked", "00000", int8) as writer:
            writer.copy(shard, 3)
            writer.copy(shard, 1)
            with pytest.raises(RecordError, match="in the shard already"):
                writer.copy(shard, 1)
    assert (tmp_path / "picked" / "00000.tar").read_bytes() == (tmp_path / "fewer" / "00000.tar").read_bytes()
    assert (tmp_path / "picked" / "00000.json").read_bytes() == (tmp_path / "fewer" / "00000.json").read_bytes()


def test_a_shard_of_the_other_storage_or_with_damage_is_not_taken_over(tmp_path: Path) -> None:
    reader = write_folder(tmp_path / "a", [STORED])
    receipt = reader.manifest.shards[0]
    writer = ShardWriter(tmp_path / "b", "00000", int8=True)
    with StoredShard(tmp_path / "a", receipt) as shard, writer, pytest.raises(ValueError, match="float16.*int8"):
        writer.copy(shard, 0)
    row = np.load(tmp_path / "a" / "00000.npy")[0]
    for place in (int(row["offset"] + row["size"]) - 1, int(row["jpeg_offset"]) + 9):
        content = bytearray((tmp_path / "a" / "00000.tar").read_bytes())
        content[place] ^= 1
        (tmp_path / "a" / "00000.tar").write_bytes(content)
        with StoredShard(tmp_path / "a", receipt) as shard, ShardWriter(tmp_path / "c", "00000") as writer:
            with pytest.raises(DamagedRecord, match="'a'"):
                writer.copy(shard, 0)
            writer.copy(shard, 1)
        content[place] ^= 1
        (tmp_path / "a" / "00000.tar").write_bytes(content)
    index = bytearray((tmp_path / "a" / "00000.npy").read_bytes())
    index[-1] ^= 1
    (tmp_path / "a" / "00000.npy").write_bytes(index)
    with pytest.raises(UserError, match="00000.npy is damaged"):
        StoredShard(tmp_path / "a", receipt)


def test_the_pictures_of_a_row_without_its_features(tmp_path: Path) -> None:
    record = full_record("k", 3, pictures=3)
    record = dataclasses.replace(record, pictures=(*record.pictures[:1], STORED[2].pictures[0], *record.pictures[2:]))
    reader = write_folder(tmp_path, [[STORED[0], record]])
    shard, row = ShardReader(tmp_path).locate(len(reader) - 1)
    assert shard.jpegs(row) == [noise_jpeg(3), None, noise_jpeg(5)]
