"""Verification: a flipped byte anywhere is found and named; what is shown is what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_records import CLASSES, full_narration, full_picture, full_record, write_folder

from opt.cli import main
from opt.config import UserError
from opt.data.manifest import read_receipt, write_manifest, write_receipt
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardWriter
from opt.data.verify import InspectConfig, VerifyConfig, inspect, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(tmp_path, f"{shard:05d}") as writer:
            for number in range(3):
                seen = Picture(64, 48, codes=rng.integers(9, size=(8, 8)).astype(np.int16), jpeg=rng.bytes(700))
                told = Narration("0", "A red cube.", rng.standard_normal((5, 6)).astype(np.float16), 12.5, 0.4)
                writer.write(Record(f"k{shard}{number}", (seen,), (told, Narration("1", "Again."))))
            writer.fail("lost", "the recording is missing")
    write_manifest(tmp_path, ["00000", "00001"], {"regions": {"name": "tiny detector", "sha256": "12ab"}}, ("a",), 9)
    return tmp_path


def test_a_sound_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for deep in (False, True):
        verify(VerifyConfig(folder, deep))
    assert "2 shards, 6 records, 12 samples" in capsys.readouterr().out


def test_every_flipped_byte_is_found(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in {0, len(content) - 1, *rng.integers(len(content), size=25).tolist()}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                verify(VerifyConfig(folder, deep=True))
        path.write_bytes(content)
    verify(VerifyConfig(folder, deep=True))


def test_damage_names_shard_and_key(folder: Path) -> None:
    path = folder / "00001.tar"
    index = np.load(folder / "00001.npy")
    content = bytearray(path.read_bytes())
    content[int(index["offset"][2] + index["size"][2]) - 1] ^= 1  # features of the second record
    content[int(index["jpeg_offset"][4]) + 3] ^= 1  # picture of the third
    path.write_bytes(content)
    verify(VerifyConfig(folder))
    with pytest.raises(UserError, match=r"(?s)2 problems\n  00001.tar: key 'k11': .*\n  00001.tar: key 'k12': "):
        verify(VerifyConfig(folder, deep=True))


def test_quick_finds_missing_short_and_foreign_files(folder: Path) -> None:
    tar, other = (folder / "00000.tar").read_bytes(), (folder / "00001.tar").read_bytes()
    (folder / "00000.tar").write_bytes(tar[:-10])
    with pytest.raises(UserError, match="00000.tar: .* bytes, expected"):
        verify(VerifyConfig(folder))
    (folder / "00000.tar").unlink()
    with pytest.raises(UserError, match="00000.tar: missing"):
        verify(VerifyConfig(folder))
    (folder / "00000.tar").write_bytes(other)
    with pytest.raises(UserError, match="00000.tar: key 'k10' at byte 512: not the record"):
        verify(VerifyConfig(folder))
    (folder / "00000.tar").write_bytes(tar)
    receipt = read_receipt(folder, "00000")
    assert receipt is not None
    (folder / "00000.json").unlink()
    with pytest.raises(UserError, match="00000.json: missing"):
        verify(VerifyConfig(folder))
    write_receipt(folder, receipt)
    verify(VerifyConfig(folder, deep=True))


def test_keys_repeated_between_shards_are_found(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        with ShardWriter(tmp_path, name) as writer:
            writer.write(Record("twice", (Picture(3, 3),)))
    write_manifest(tmp_path, ["00000", "00001"], {}, (), 0)
    with pytest.raises(UserError, match="key 'twice': more than one record"):
        verify(VerifyConfig(tmp_path))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ((("a",), 32, ("red", "blue"), (7, 9)), "picture.0.classes: the id [0-4] of 1 that"),
        ((CLASSES, 3, ("red", "blue"), (7, 9)), "picture.0.codes: the id [0-9]+ of 3 that"),
        ((CLASSES, 32, (), (7, 9)), "picture.0.attributes: the id [01] of 0 that"),
        ((CLASSES, 32, ("red", "blue"), (7,)), r"narration.0.codes: .* of codebooks of \[7\] entries"),
        ((CLASSES, 32, ("red", "blue"), (7, 2)), r"narration.0.codes: .* of codebooks of \[7, 2\] entries"),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_ids_that_stand_for_nothing_are_found(tmp_path: Path, names: tuple, problem: str, int8: bool) -> None:
    write_folder(tmp_path, [[full_record("a", 0), full_record("b", 1)]], int8)
    verify(VerifyConfig(tmp_path, deep=True))
    write_manifest(tmp_path, ["00000"], {}, *names)
    with pytest.raises(UserError, match=f"00000.tar: key 'a': {problem}"):
        verify(VerifyConfig(tmp_path, deep=True))


def test_the_first_id_that_stands_for_nothing_is_found(tmp_path: Path) -> None:
    record = full_record("a", 0)
    write_folder(tmp_path, [[record]])
    picture, spoken = record.pictures[0], record.narrations[0].codes
    assert picture.codes is not None and spoken is not None
    codebook, entries = int(picture.codes.max()) + 1, [int(most) + 1 for most in spoken.max(0)]
    for fewer in range(3):
        sizes = [codebook - (fewer == 1), entries[0], entries[1] - (fewer == 2)]
        write_manifest(tmp_path, ["00000"], {}, CLASSES, sizes[0], ("red", "blue"), sizes[1:])
        if not fewer:
            verify(VerifyConfig(tmp_path, deep=True))
            continue
        with pytest.raises(UserError, match="codes"):
            verify(VerifyConfig(tmp_path, deep=True))


def test_inspect_shows_how_features_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    stored = [Record("k", (full_picture(rng, 30, width=100),), (full_narration(rng, 0, 40),))]
    write_folder(tmp_path, [stored], int8=True)
    inspect(InspectConfig(tmp_path, number=1))
    shown = capsys.readouterr().out
    regions = 30 * (100 + 4 + 4 * 4 + 2 + 4 + 4 * (2 + 2) + 2 * (2 + 2))  # int8, scale, box, class, score, top, attrs
    speech = 40 * (6 + 4 + 2 * 2)
    for part in (
        "stored as int8", "5 classes and 2 attributes", "codebooks of [7, 9]", "attribute_scores 30 x 2", "40 x 2",
        f"regions {regions:,}, codes 128, jpeg 0, speech {speech:,}",
    ):  # fmt: skip
        assert part in shown


def test_inspect_counts_failures_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path, "00000") as writer:
        for number in range(30):
            writer.fail(f"k{number}", f"picture {number}: broken picture (at byte {number})")
        writer.fail("other", "odd")
    write_manifest(tmp_path, ["00000"], {}, (), 0)
    inspect(InspectConfig(tmp_path))
    shown = capsys.readouterr().out
    assert "      30  picture: broken picture\n" in shown and "       1  odd\n" in shown


def test_inspect_shows_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(InspectConfig(folder, number=2))
    shown = capsys.readouterr().out
    for part in ("tiny detector", "12 samples", "lost: the recording is missing", "A red cube.", "5 x 6", "8 x 8"):
        assert part in shown
    assert shown.count("sample ") == 2
    (folder / "empty").mkdir()
    with ShardWriter(folder / "empty", "00000"):
        pass
    write_manifest(folder / "empty", ["00000"], {}, (), 0)
    inspect(InspectConfig(folder / "empty"))
    verify(VerifyConfig(folder / "empty", deep=True))


def test_a_negative_number_of_samples_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(InspectConfig(folder, number=0))
    assert "sample " not in capsys.readouterr().out
    with pytest.raises(UserError, match="--number -1"):
        inspect(InspectConfig(folder, number=-1))


def test_the_verbs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", str(folder), "--deep"]) == 0
    (folder / "manifest.json").unlink()
    assert main(["shards", "verify", str(folder)]) == 2
    assert "run the command that made the folder again" in capsys.readouterr().err
