"""Shards: what goes in comes out, in any order, or an error that names the damage."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from opt.config import UserError
from opt.data.corpora import Corpora
from opt.data.manifest import read_receipt, write_manifest
from opt.data.record import Narration, Picture, Record, RecordError
from opt.data.shards import INDEX, ShardReader, ShardWriter, key_hash
from opt.data.subset import Subset


def picture(rng: np.random.Generator, regions: int = 3, jpeg: bool = True) -> Picture:
    return Picture(
        width=64,
        height=48,
        regions=rng.standard_normal((regions, 8)).astype(np.float16),
        boxes=rng.random((regions, 4), np.float32),
        classes=rng.integers(5, size=regions).astype(np.int16),
        scores=rng.random(regions, np.float32),
        codes=rng.integers(32, size=(8, 8)).astype(np.int16),
        jpeg=rng.bytes(int(rng.integers(100, 2000))) if jpeg else None,
    )


def narration(rng: np.random.Generator, number: int, frames: int = 5) -> Narration:
    speech = rng.standard_normal((frames, 6)).astype(np.float16) if frames else None
    return Narration(f"n{number}", f"A red cube, number {number}.", speech, 12.5 if frames else 0.0, 0.08 * frames)


def records() -> list[Record]:
    """0, 1 and 2 pictures by 0, 1 and 3 narrations, without the empty record; long and non-ASCII keys included."""
    rng = np.random.default_rng(0)
    made = [
        Record(
            f"p{pictures}-n{narrations}",
            tuple(picture(rng, regions=3 + n, jpeg=n != 1 or narrations != 1) for n in range(pictures)),
            tuple(narration(rng, n, frames=5 * n) for n in range(narrations)),
        )
        for pictures in range(3)
        for narrations in (0, 1, 3)
        if pictures or narrations
    ]
    return [
        *made,
        Record("k" * 150, (picture(rng, regions=0),), (narration(rng, 0),)),
        Record("é ü", (Picture(5, 5),)),
        Record("third-only", (Picture(5, 5), Picture(6, 6), picture(rng), picture(rng))),
    ]


def write(folder: Path, shards: list[list[Record]]) -> ShardReader:
    names = [f"{number:05d}" for number in range(len(shards))]
    for name, content in zip(names, shards, strict=True):
        with ShardWriter(folder, name) as shard:
            for record in content:
                shard.write(record)
    write_manifest(folder, names, {"regions": {"name": "tiny"}}, ("a", "b"), 32)
    return ShardReader(folder)


def same(first: object, second: object) -> bool:
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(same(getattr(first, n), getattr(second, n)) for n in names)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.dtype == second.dtype and np.array_equal(first, second)
    return first == second


def test_records_come_back_as_they_went_in(tmp_path: Path) -> None:
    stored = records()
    reader = write(tmp_path, [stored[:4], [], stored[4:]])
    expected = [(record, n) for record in stored for n in (range(len(record.narrations)) or [-1])]
    assert len(reader) == len(expected) == reader.manifest.samples
    for number, (record, chosen) in reversed(list(enumerate(expected))):
        assert same(reader.record(number, jpeg=True), record)
        sample = reader.sample(number)
        assert (sample.key, sample.narration) == (record.key, chosen)
        assert all(picture.jpeg is None for picture in sample.pictures)
        assert same(reader.sample(number, jpeg=True).pictures, record.pictures)
        if chosen >= 0:
            narration = record.narrations[chosen]
            assert (sample.narration_id, sample.caption) == (narration.narration_id, narration.caption)
            assert same(sample.speech, narration.speech)
        else:
            assert sample.caption is None and sample.speech is None
    assert list(reader.keys()) == [record.key for record, _ in expected]
    assert list(reader.captions()) == [record.narrations[n].caption for record, n in expected if n >= 0]
    assert reader.key_hash.tolist() == [key_hash(record.key) for record, _ in expected]


def test_lengths_count_what_is_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    record = Record("a", (picture(rng, 3), picture(rng, 4)), (narration(rng, 0, 7), narration(rng, 1, 0)))
    lengths = write(tmp_path, [[record], [Record("b", (Picture(1, 1),))]]).lengths
    assert lengths.words.tolist() == [7, 7, 0]  # A red cube , number 0 .
    assert lengths.regions.tolist() == [7, 7, 0]
    assert lengths.frames.tolist() == [7, 0, 0]
    assert lengths.codes.tolist() == [128, 128, 0]
    assert all(getattr(lengths, f.name).dtype == np.int32 for f in dataclasses.fields(lengths))


def test_the_tar_is_plain(tmp_path: Path) -> None:
    stored = records()
    write(tmp_path, [stored])
    names = []
    for record in stored:
        names.append(f"{record.key}.safetensors")
        for number, one in enumerate(record.pictures):
            if one.jpeg is not None:
                names.append(f"{record.key}.jpg" if number == 0 else f"{record.key}.{number}.jpg")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames() == names
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}
        index = np.load(tmp_path / "00000.npy", allow_pickle=False)
        offsets = {m.offset_data for m in tar.getmembers() if m.name.endswith(".safetensors")}
        assert set(index["offset"].tolist()) == offsets
        file = tar.extractfile("p2-n3.jpg")
        assert file is not None and file.read() == next(r for r in stored if r.key == "p2-n3").pictures[0].jpeg
    assert INDEX.itemsize <= 64


def test_members_are_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load

    stored = records()
    write(tmp_path, [stored])
    record = next(r for r in stored if r.key == "p2-n3")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        file = tar.extractfile("p2-n3.safetensors")
        assert file is not None
        arrays = load(file.read())
    assert np.array_equal(arrays["picture.1.regions"], record.pictures[1].regions)
    assert np.array_equal(arrays["narration.2.speech"], record.narrations[2].speech)


def test_webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path, [records()])
    samples = {s["__key__"]: s for s in webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)}
    assert {"safetensors", "jpg", "1.jpg"} <= set(samples["p2-n3"])


def test_equal_records_give_equal_bytes_and_one_more_failure_shifts_nothing(tmp_path: Path) -> None:
    stored = records()
    first = write(tmp_path / "a", [stored[:5], stored[5:]])
    second = write(tmp_path / "b", [stored[:5], stored[5:]])
    third = write(tmp_path / "c", [stored[:4], stored[5:]])
    for name in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "00001.tar").read_bytes() == (tmp_path / "c" / "00001.tar").read_bytes()
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_a_damaged_byte_is_named_when_read(tmp_path: Path) -> None:
    reader = write(tmp_path, [records()])
    index = np.load(tmp_path / "00000.npy")
    number = int(np.flatnonzero(index["key"] == key_hash("p2-n3"))[1])
    flip(tmp_path / "00000.tar", int(index[number]["offset"] + index[number]["size"] - 1))
    flip(tmp_path / "00000.tar", int(index[0]["offset"] + 5))
    with pytest.raises(UserError, match=r"00000\.tar.*'p2-n3'"):
        reader.sample(number)
    with pytest.raises(UserError, match=r"00000\.tar.*'p0-n1'"):
        reader.sample(0)
    jpeg = int(np.flatnonzero(index["key"] == key_hash("p1-n0"))[0])
    flip(tmp_path / "00000.tar", int(index[jpeg]["jpeg_offset"]))
    reader.sample(jpeg)
    with pytest.raises(UserError, match="'p1-n0'"):
        reader.sample(jpeg, jpeg=True)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_stopped_writer_leaves_what_was_there(tmp_path: Path) -> None:
    stored = records()
    write(tmp_path, [stored])
    before = read_receipt(tmp_path, "00000")
    for name in ("00000", "00001"):
        with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, name) as shard:
            shard.write(stored[0])
            raise KeyboardInterrupt
    assert read_receipt(tmp_path, "00000") == before is not None
    with pytest.raises(UserError, match="00001 is incomplete"):
        write_manifest(tmp_path, ["00000", "00001"], {}, (), 0)
    assert not list(tmp_path.glob(".*"))


def test_a_writer_stopped_while_it_replaces_a_shard_leaves_no_receipt(tmp_path: Path, monkeypatch) -> None:
    stored = records()
    write(tmp_path, [stored])
    monkeypatch.setattr("opt.data.shards.write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "00000") as shard:
        shard.write(stored[0])
    assert read_receipt(tmp_path, "00000") is None


def test_a_process_killed_while_writing_leaves_no_receipt(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with ShardWriter(tmp_path, "00000") as shard:
            shard.write(records()[0])
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert read_receipt(tmp_path, "00000") is None
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


def test_a_shard_cut_short_counts_as_missing(tmp_path: Path) -> None:
    write(tmp_path, [records()])
    assert read_receipt(tmp_path, "00000") is not None
    with open(tmp_path / "00000.tar", "r+b") as file:
        file.truncate(1000)
    assert read_receipt(tmp_path, "00000") is None


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [records()])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="1 complete shards but no manifest.json.*opt extract"):
        ShardReader(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        ShardReader(tmp_path / "nowhere")


def test_failures_and_widths_reach_the_manifest(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "00000") as shard:
        shard.write(records()[-1])
        shard.fail("broken", "the picture is cut short")
    manifest = write_manifest(tmp_path, ["00000"], {}, ("a",), 32)
    assert [(f.key, f.reason) for f in ShardReader(tmp_path).manifest.failures] == [
        ("broken", "the picture is cut short")
    ]
    assert (manifest.region_width, manifest.speech_width, manifest.frame_rate) == (8, 0, 0)
    assert ShardReader(tmp_path).manifest == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["codebook"] == 32


def test_a_refused_record_leaves_nothing_behind(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    good = Record("good", (picture(rng),))
    with ShardWriter(tmp_path, "00000") as shard:
        shard.write(good)
        for bad in (
            good,  # the key a second time
            Record("a.b", (Picture(1, 1),)),
            Record("wide", (dataclasses.replace(picture(rng), regions=np.zeros((3, 9), np.float16)),)),
        ):
            with pytest.raises(RecordError):
                shard.write(bad)
    write(tmp_path / "alone", [[good]])
    assert (tmp_path / "00000.tar").read_bytes() == (tmp_path / "alone" / "00000.tar").read_bytes()


def test_a_reader_travels_to_other_processes(tmp_path: Path) -> None:
    reader = write(tmp_path, [records()])
    reader.sample(3)
    copy = pickle.loads(pickle.dumps(reader))
    assert reader._open and not copy._open  # open files stay where they are
    assert same(copy.sample(3), reader.sample(3))
    child = os.fork()
    if child == 0:
        os._exit(0 if same(reader.sample(5), copy.sample(5)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt.data.shards.OPEN_SHARDS", 2)
    stored = records()
    reader = write(tmp_path, [[record] for record in stored])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [reader.sample(n).key for n in range(len(reader))] == list(reader.keys())
    assert len(os.listdir("/proc/self/fd")) <= before + 6


def test_no_index_is_mapped_or_held(tmp_path: Path) -> None:
    stored = records()
    reader = write(tmp_path, [stored[:4], stored[4:]])
    assert len(reader.lengths) == len(reader.key_hash) == len(list(reader.keys()))
    reader.sample(len(reader) - 1)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not any("index" in vars(shard) for shard in reader._open.values())


def test_an_index_cut_short_under_a_reader_is_a_sentence(tmp_path: Path) -> None:
    reader = write(tmp_path, [records()])
    reader.sample(0)
    os.truncate(tmp_path / "00000.npy", 200)
    with pytest.raises(UserError, match="00000.npy was cut short"):
        reader.sample(len(reader) - 1)


def test_sizes_are_those_of_each_corpus(tmp_path: Path) -> None:
    readers = [write(tmp_path / "a", [records()]), write(tmp_path / "b", [records()])]
    many = len(readers[0])
    assert readers[0].sizes == (many,)
    assert Subset(readers[0], np.array([3, 3, 0])).sizes == (3,)
    assert Subset(Corpora(readers), np.array([many, 0, many - 1, many + 2, many])).sizes == (2, 3)
    assert Subset(Corpora(readers), np.array([many + 1])).sizes == (0, 1)
