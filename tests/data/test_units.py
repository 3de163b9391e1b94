"""`opt shards units`: every frame gets its nearest centroid, other shards the same units, and nothing else changes."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from stored_records import CLASSES, CODEBOOK, full_record, noise_jpeg, records_of, same

from opt.config import UserError
from opt.data import derive
from opt.data.encoding import encode, extended, named_arrays, parse_header
from opt.data.manifest import Origin, shard_name, write_manifest
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader, ShardWriter
from opt.data.stored import StoredShard
from opt.data.units import FILE, UnitsConfig, draw_frames, fit, nearest, read_centroids, units
from opt.data.verify import VerifyConfig, verify
from pretrain.run import facts

AUDIO = {"audio": {"backend": "b", "weights": "w", "weights_sha256": "aa", "settings": {"layer": 6}}}
ORIGIN = Origin("made up", "train")


def without_codes(record: Record) -> Record:
    return dataclasses.replace(record, narrations=tuple(
        dataclasses.replace(told, codes=None) for told in record.narrations))


STORED = [
    *(without_codes(full_record(f"k{number}", number, narrations=1 + number % 3)) for number in range(6)),
    Record("words", (), (Narration("0", "Only words."),)),
    Record("seen", (Picture(5, 5, jpeg=noise_jpeg(9)),)),
]


def write(folder: Path, records: list[Record], int8: bool = False, audio: dict = AUDIO, size: int = 3) -> ShardReader:
    """Shards of `size` records, without speech codes; the first notes a failure."""
    starts = range(0, len(records), size)
    for number, start in enumerate(starts):
        with ShardWriter(folder, shard_name(number), int8=int8) as shard:
            if not number:
                shard.fail("lost", "recording 0: missing file")
            for record in records[start : start + size]:
                shard.write(record)
    write_manifest(folder, [shard_name(number) for number in range(len(starts))], audio, CLASSES, CODEBOOK,
                   ("red", "blue"), (), [ORIGIN])
    return ShardReader(folder)


def speaking(key: str, speech_TD: np.ndarray) -> Record:
    return Record(key, (), (Narration("0", None, speech_TD.astype(np.float16), 10.0, len(speech_TD) / 10),))


def content(reader: ShardReader) -> list[bytearray]:
    firsts = np.flatnonzero(reader.column("narration") <= 0)
    return [shard.content(row) for shard, row in map(reader.locate, firsts.tolist())]


@pytest.mark.parametrize("int8", [False, True])
def test_every_frame_gets_its_nearest_centroid_and_nothing_else_changes(tmp_path: Path, int8: bool) -> None:
    before = write(tmp_path / "before", STORED, int8)
    units(UnitsConfig(before.folder, tmp_path / "out", clusters=7))
    after = ShardReader(tmp_path / "out")
    verify(VerifyConfig(tmp_path / "out", deep=True))
    assert same([without_codes(record) for record in records_of(after)], records_of(before))
    for old, new in zip(content(before), content(after), strict=True):
        tensors = {name: about for name, about in parse_header(new)[1].items() if not name.endswith(".codes")
                   or name.startswith("picture")}
        assert tensors.keys() == parse_header(old)[1].keys()  # int8 and its scales are taken over, too
    centroids_KD = read_centroids(tmp_path / "out" / "centroids.safetensors", before.manifest, before.folder)
    assert centroids_KD.shape == (7, 6)
    for number in range(len(after)):
        sample = after.sample(number)
        if sample.speech is None:
            assert sample.speech_codes is None
            continue
        assert sample.speech_codes is not None and sample.speech_codes.dtype == np.int16
        far_TK = ((sample.speech[:, None].astype(np.float64) - centroids_KD[None]) ** 2).sum(2)
        np.testing.assert_array_equal(sample.speech_codes[:, 0], far_TK.argmin(1))
    manifest = after.manifest
    assert manifest.speech_codebooks == facts(manifest).speech_codebooks == (7,)
    assert manifest.failures == before.manifest.failures
    assert manifest.origins == (ORIGIN,) and manifest.storage == before.manifest.storage
    assert {name: manifest.extractors[name] for name in AUDIO} == AUDIO
    assert [shard.records for shard in manifest.shards] == [3, 3, 2]


def test_other_shards_get_the_same_units(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train", STORED[:4]), write(tmp_path / "test", STORED[4:])
    units(UnitsConfig(train.folder, tmp_path / "units", clusters=5))
    file = tmp_path / "units" / "centroids.safetensors"
    units(UnitsConfig(test.folder, tmp_path / "held", centroids=file))
    assert (tmp_path / "held" / file.name).read_bytes() == file.read_bytes()
    first, second = ShardReader(tmp_path / "units").manifest, ShardReader(tmp_path / "held").manifest
    for name in ("weights_sha256", "settings", "backend"):
        assert first.extractors["units"][name] == second.extractors["units"][name]
    assert first.speech_codebooks == second.speech_codebooks == (5,)
    sample = ShardReader(tmp_path / "held").sample(0)
    assert sample.speech is not None and sample.speech_codes is not None
    centroids_KD = read_centroids(file, first, train.folder)
    np.testing.assert_array_equal(sample.speech_codes, nearest(sample.speech, centroids_KD))


def test_well_parted_sounds_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spoken = [rng.integers(4, size=12) for _ in range(20)]
    centres = 10 * rng.normal(size=(4, 6))
    write(tmp_path / "in", [speaking(f"k{number}", centres[words] + 0.1 * rng.normal(size=(12, 6)))
                            for number, words in enumerate(spoken)])
    units(UnitsConfig(tmp_path / "in", tmp_path / "out", clusters=4, frames=100))
    reader = ShardReader(tmp_path / "out")
    pairs = {(int(word), int(code)) for number, words in enumerate(spoken)
             for word, code in zip(words, reader.sample(number).speech_codes[:, 0], strict=True)}
    assert len(pairs) == 4 and {code for _, code in pairs} == set(range(4))


def test_frames_are_drawn_once_each_and_evenly(tmp_path: Path) -> None:
    lengths, start, records = [3, 50, 1, 46], 0, []
    for number, length in enumerate(lengths):
        records.append(speaking(f"k{number}", np.arange(start, start + length)[:, None] * np.ones(2)))
        start += length
    reader = write(tmp_path, [*records[:2], STORED[-1], STORED[-2], *records[2:]])
    np.testing.assert_array_equal(draw_frames(reader, 100, 0), np.arange(100)[:, None] * np.ones(2))
    drawn = draw_frames(reader, 30, 1)[:, 0]
    assert len(np.unique(drawn)) == 30 and set(drawn) <= set(range(100))
    np.testing.assert_array_equal(drawn, draw_frames(reader, 30, 1)[:, 0])
    assert not np.array_equal(drawn, draw_frames(reader, 30, 2)[:, 0])
    often = np.bincount(np.concatenate([draw_frames(reader, 30, seed)[:, 0] for seed in range(60)]).astype(int))
    assert len(often) == 100 and often.min() >= 5 and often.max() <= 35  # 18 expected, deviation 3.5


def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    rng, peaks = np.random.default_rng(0), []
    for count in (20, 320):  # 0.6 and 10 MB of features
        folder = tmp_path / f"in{count}"
        write(folder, [speaking(f"k{number}", rng.normal(size=(250, 64))) for number in range(count)], size=20)
        units(UnitsConfig(folder, tmp_path / f"warm{count}", clusters=4, frames=200))
        tracemalloc.start()
        units(UnitsConfig(folder, tmp_path / f"out{count}", clusters=4, frames=200))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 400_000


def test_units_cut_short_go_on_and_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", STORED)
    copy, copied = derive._copy, []

    def cut_short(*given) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(given)
        copy(*given)

    monkeypatch.setattr(derive, "_copy", cut_short)
    with pytest.raises(KeyboardInterrupt):
        units(UnitsConfig(tmp_path / "in", tmp_path / "out", clusters=4))
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(derive, "_copy", copy)
    kept = (tmp_path / "out" / "00001.tar").stat().st_mtime_ns, (tmp_path / "out/centroids.safetensors").read_bytes()
    units(UnitsConfig(tmp_path / "in", tmp_path / "out", clusters=4))
    assert kept == ((tmp_path / "out" / "00001.tar").stat().st_mtime_ns,
                    (tmp_path / "out/centroids.safetensors").read_bytes())
    units(UnitsConfig(tmp_path / "in", tmp_path / "at once", clusters=4))
    for path in (tmp_path / "at once").glob("0*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    with pytest.raises(UserError, match="was begun with clusters 4; now it is clusters 5"):
        units(UnitsConfig(tmp_path / "in", tmp_path / "out", clusters=5))


def test_what_makes_no_units_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folder, out = write(tmp_path / "in", STORED).folder, tmp_path / "out"
    units(UnitsConfig(folder, tmp_path / "units", clusters=3))
    file = tmp_path / "units" / "centroids.safetensors"
    silent = write(tmp_path / "silent", STORED[-2:]).folder
    wide = write(tmp_path / "wide", [speaking("a", np.ones((4, 7)))]).folder
    other = write(tmp_path / "other", STORED[:2], audio={"audio": AUDIO["audio"] | {"settings": {"layer": 9}}}).folder
    (tmp_path / "broken").write_bytes(b"no centroids")
    for config, message in [
        (UnitsConfig(silent, out), "holds no speech features"),
        (UnitsConfig(tmp_path / "units", out), r"has speech codes already, of \[3\] entries"),
        (UnitsConfig(folder, out, clusters=10_000), r"--clusters 10000: 68 frames are drawn"),
        (UnitsConfig(folder, out, clusters=9, frames=8), r"--clusters 9: 8 frames are drawn"),
        (UnitsConfig(folder, out, clusters=0), r"--clusters 0: must lie in 1 to 32,768"),
        (UnitsConfig(folder, out, clusters=4, centroids=file), "--clusters: .* leave the option out"),
        (UnitsConfig(wide, out, centroids=file), r"shape \(3, 6\), the speech of .* is 7 wide"),
        (UnitsConfig(other, out, centroids=file), "another speech network, or of another layer"),
        (UnitsConfig(folder, out, centroids=tmp_path / "gone"), "gone is not there"),
        (UnitsConfig(folder, out, centroids=tmp_path / "broken"), "broken holds no centroids"),
        (UnitsConfig(folder, folder), "is the folder that is read"),
        (UnitsConfig(folder, out, seed=-1), "--seed -1: must lie in 0 to"),
    ]:
        with pytest.raises(UserError, match=message):
            units(config)
        assert not out.exists()


def test_without_scikit_learn_centroids_of_another_folder_still_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "in", STORED).folder
    units(UnitsConfig(folder, tmp_path / "units", clusters=3))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match="pip install .*units"):
        fit(np.ones((4, 2), np.float32), 2, 0)
    units(UnitsConfig(folder, tmp_path / "more", centroids=tmp_path / "units" / "centroids.safetensors"))


def test_extended_bytes_are_those_of_the_whole_record() -> None:
    whole = full_record("a", 3, narrations=2)
    codes = {name: array for name, array in named_arrays(whole).items()
             if name.startswith("narration") and name.endswith(".codes")}
    for int8 in (False, True):
        assert extended(encode(without_codes(whole), int8), codes) == encode(whole, int8)


def test_damage_of_the_source_is_named(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", STORED)
    path = tmp_path / "in" / "00001.tar"
    damaged = bytearray(path.read_bytes())
    with StoredShard(tmp_path / "in", reader.manifest.shards[1]) as shard:
        damaged[int(shard.index["offset"][0]) + int(shard.index["size"][0]) - 1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="key 'k3' are damaged"):
        units(UnitsConfig(tmp_path / "in", tmp_path / "out", clusters=3))


@pytest.mark.parametrize(("rows", "value"), [(0, 0.0), (3, np.nan), (2**15 + 1, 0.0)])
def test_centroids_that_are_none_are_refused(tmp_path: Path, rows: int, value: float) -> None:
    folder, made = write(tmp_path / "in", STORED).folder, tmp_path / "centroids.safetensors"
    units(UnitsConfig(folder, tmp_path / "units", clusters=3))
    with safe_open(tmp_path / "units" / FILE, "np") as file:
        about, width = file.metadata(), file.get_tensor("centroids").shape[1]
    save_file({"centroids": np.full((rows, width), value, np.float32)}, made, about)
    with pytest.raises(UserError, match=f"holds {rows:,} centroids; expected from 1 to 32,768, of finite numbers"):
        units(UnitsConfig(folder, tmp_path / "out", centroids=made))
    assert not (tmp_path / "out").exists()
