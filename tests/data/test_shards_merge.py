"""`opt shards merge`: folders become one, byte for byte, or a sentence says why they do not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stored_records import CLASSES, full_record, records_of, same, write_folder

from opt.config import UserError
from opt.data import derive
from opt.data.manifest import Failure, read_manifest, read_receipt, write_manifest, write_receipt
from opt.data.merge import MergeConfig, merge
from opt.data.record import Narration, Record
from opt.data.shards import ShardReader, ShardWriter
from opt.data.verify import VerifyConfig, verify

FIRST = [full_record(key, number) for number, key in enumerate("abcd")]
SECOND = [full_record(key, 10 + number, pictures=2) for number, key in enumerate("efbg")]


@pytest.fixture(params=[False, True], ids=["float16", "int8"])
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    write_folder(tmp_path / "first", [FIRST[:2], FIRST[2:]], request.param)
    write_folder(tmp_path / "second", [SECOND[:3], SECOND[3:]], request.param)
    return tmp_path / "first", tmp_path / "second"


def test_all_records_once_as_they_are_stored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    merge(MergeConfig(tmp_path / "out", folders))
    merged, sources = ShardReader(tmp_path / "out"), [ShardReader(folder) for folder in folders]
    kept = [record for record in records_of(sources[1]) if record.key != "b"]
    assert same(records_of(merged), [*records_of(sources[0]), *kept])
    assert [shard.name for shard in merged.manifest.shards] == ["00000", "00001", "00002", "00003"]
    assert (tmp_path / "out" / "00001.tar").read_bytes() == (folders[0] / "00001.tar").read_bytes()
    assert (tmp_path / "out" / "00003.npy").read_bytes() == (folders[1] / "00001.npy").read_bytes()
    assert merged.manifest.failures == (Failure("b", f"record: repeated key (the first is in {folders[0]})"),)
    for name in ("extractors", "region_classes", "region_attributes", "codebook", "speech_codebooks", "storage"):
        assert getattr(merged.manifest, name) == getattr(sources[0].manifest, name)
    verify(VerifyConfig(tmp_path / "out", deep=True))


def test_the_first_folder_that_has_a_key_is_named(tmp_path: Path) -> None:
    for name, keys in (("one", "ab"), ("two", "cd"), ("three", "bcea")):
        write_folder(tmp_path / name, [[full_record(key, 0)] for key in keys])
    merge(MergeConfig(tmp_path / "out", (tmp_path / "one", tmp_path / "two", tmp_path / "three")))
    firsts = {failure.key: failure.reason for failure in read_manifest(tmp_path / "out").failures}
    assert {key: reason.split("/")[-1] for key, reason in firsts.items()} == {"b": "one)", "c": "two)", "a": "one)"}


def test_a_merge_of_a_merge_counts_what_it_left_out_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, keys in (("one", "ab"), ("two", "bc"), ("three", "cd")):
        write_folder(tmp_path / name, [[full_record(key, 0)] for key in keys])
    merge(MergeConfig(tmp_path / "both", (tmp_path / "one", tmp_path / "two")))
    merge(MergeConfig(tmp_path / "out", (tmp_path / "both", tmp_path / "three")))
    assert capsys.readouterr().out.count("; 1 left out, their keys being repeated\n") == 2


def test_failures_of_the_folders_are_kept(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_folder(tmp_path / name, [[full_record(name, 0)]])
        receipt = read_receipt(tmp_path / name, "00000")
        assert receipt is not None
        write_receipt(tmp_path / name, type(receipt)(**{**vars(receipt), "failures": (Failure(name, "row: odd"),)}))
        write_manifest(tmp_path / name, ["00000"], {}, CLASSES, 32, ("red", "blue"), (7, 9))
    merge(MergeConfig(tmp_path / "out", (tmp_path / "first", tmp_path / "second")))
    assert [failure.key for failure in read_manifest(tmp_path / "out").failures] == ["first", "second"]


def test_a_merge_cut_short_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, copied = derive._copy, []

    def cut_short(piece: derive.Piece, writer: ShardWriter, more: None) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(writer.name)
        copy(piece, writer, more)

    monkeypatch.setattr(derive, "_copy", cut_short)
    with pytest.raises(KeyboardInterrupt):
        merge(MergeConfig(tmp_path / "out", folders))
    with pytest.raises(UserError, match="2 complete shards but no manifest.json"):
        ShardReader(tmp_path / "out")
    monkeypatch.setattr(derive, "_copy", lambda *given: (copied.append(given[1].name), copy(*given)))
    merge(MergeConfig(tmp_path / "out", folders))
    assert copied == ["00000", "00001", "00002", "00003"]
    merge(MergeConfig(tmp_path / "at once", folders))
    for path in (tmp_path / "at once").glob("0*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    copied.clear()
    merge(MergeConfig(tmp_path / "out", folders))
    assert not copied and "7 records" in capsys.readouterr().out
    (tmp_path / "out" / "00002.json").unlink()
    copied += ["", ""]
    monkeypatch.setattr(derive, "_copy", cut_short)
    with pytest.raises(KeyboardInterrupt):
        merge(MergeConfig(tmp_path / "out", folders))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractors": {"regions": {"weights": "other"}}}, r"extractors.regions.weights is made up, then other"),
        ({"extractors": {"audio": {}}}, r"extractors.regions is \{'weights': 'made up'\}, then absent"),
        ({"region_classes": CLASSES[:3]}, "region_classes has 5 entries, then 3"),
        ({"region_classes": ("a", "b", "x", "d", "e")}, r"region_classes\[2\] is 'c', then 'x'"),
        ({"region_attributes": ()}, "region_attributes has 2 entries, then 0"),
        ({"codebook": 64}, "codebook is 32, then 64"),
        ({"speech_codebooks": (7, 8)}, r"speech_codebooks\[1\] is 9, then 8"),
    ],
)
def test_folders_made_otherwise_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    for name in ("first", "second"):
        made = write_folder(tmp_path / name, [[full_record(name, 0)]]).manifest
    fields = ("extractors", "region_classes", "codebook", "region_attributes", "speech_codebooks")
    facts = {name: getattr(made, name) for name in fields} | change
    write_manifest(tmp_path / "second", ["00000"], **facts)
    with pytest.raises(UserError, match=f"first and .*second do not go together: {message}"):
        merge(MergeConfig(tmp_path / "out", (tmp_path / "first", tmp_path / "second")))
    assert not (tmp_path / "out").exists()


def test_the_same_weights_may_lie_elsewhere(tmp_path: Path) -> None:
    for name in ("first", "second"):
        made = write_folder(tmp_path / name, [[full_record(name, 0)]]).manifest
        regions = {"weights": f"/{name}/detector.pt", "weights_sha256": "0" * 64}
        write_manifest(tmp_path / name, ["00000"], {"regions": regions}, made.region_classes, made.codebook,
                       made.region_attributes, made.speech_codebooks)
    merge(MergeConfig(tmp_path / "out", (tmp_path / "first", tmp_path / "second")))
    assert ShardReader(tmp_path / "out").manifest.records == 2


def test_storage_and_widths_must_agree_where_there_are_any(tmp_path: Path) -> None:
    write_folder(tmp_path / "first", [FIRST])
    write_folder(tmp_path / "small", [SECOND], int8=True)
    narrow = Record("narrow", (), (Narration("0", None, FIRST[0].narrations[0].speech[:, :3], 10.0, 1.0),))
    write_folder(tmp_path / "narrow", [[narrow]])
    write_folder(tmp_path / "words", [[Record("words", (), (Narration("0", "Only words."),))]])
    with pytest.raises(UserError, match="storage is float16, then int8"):
        merge(MergeConfig(tmp_path / "out", (tmp_path / "first", tmp_path / "small")))
    with pytest.raises(UserError, match="speech_width is 6, then 3"):
        merge(MergeConfig(tmp_path / "out", (tmp_path / "first", tmp_path / "narrow")))
    merge(MergeConfig(tmp_path / "out", (tmp_path / "words", tmp_path / "first")))
    assert read_manifest(tmp_path / "out").speech_width == 6


def test_an_output_folder_made_otherwise_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = folders
    with pytest.raises(UserError, match="both read and written"):
        merge(MergeConfig(first, folders))
    with pytest.raises(UserError, match="named twice"):
        merge(MergeConfig(tmp_path / "out", (first, second, tmp_path / "second" / ".." / "first")))
    with pytest.raises(UserError, match="at least two"):
        merge(MergeConfig(tmp_path / "out", (first,)))
    merge(MergeConfig(tmp_path / "out", folders))
    with pytest.raises(UserError, match="was begun with folders .*; now it is folders"):
        merge(MergeConfig(tmp_path / "out", (second, first)))
    shutil.copytree(first, tmp_path / "other")
    with pytest.raises(UserError, match="holds shards without settings.json"):
        merge(MergeConfig(tmp_path / "other", folders))
    (tmp_path / "other" / "settings.json").write_text(json.dumps({"source": "localized_narratives"}))
    with pytest.raises(UserError, match="begun with source localized_narratives"):
        merge(MergeConfig(tmp_path / "other", folders))
