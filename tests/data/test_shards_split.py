"""`opt shards split`: who is held out is a matter of keys alone, and the same split can be made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from stored_records import full_record, records_of, same, write_folder

from opt.config import UserError
from opt.data import derive
from opt.data.manifest import FrozenPart, Origin
from opt.data.merge import MergeConfig, merge
from opt.data.record import Narration
from opt.data.shards import ShardReader
from opt.data.split import FILE, SplitConfig, keys_sha256, read_split, split
from opt.data.verify import InspectConfig, VerifyConfig, inspect, verify
from opt.lock import alone

KEYS = [f"k{number}" for number in range(20)]
RECORDS = [full_record(key, number) for number, key in enumerate(KEYS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "all", [RECORDS[:7], RECORDS[7:12], RECORDS[12:]])
    return tmp_path / "all"


def first_by_hash(keys: list[str], name: str, count: int) -> list[str]:
    order = sorted((hashlib.sha256(f"{name}:{key}".encode()).hexdigest(), key) for key in keys)
    return sorted(key for _, key in order[:count])


def test_the_first_keys_by_hash_are_held_out_and_all_others_are_train(folder: Path, tmp_path: Path) -> None:
    split(SplitConfig(folder, tmp_path / "out", test=6, val=3, name="ours-6"))
    told = json.loads((tmp_path / "out" / FILE).read_text())
    nine = set(first_by_hash(KEYS, "ours-6", 9))
    assert told["keys"]["test"] == first_by_hash(KEYS, "ours-6", 6) and len(told["keys"]["val"]) == 3
    assert set(told["keys"]["test"]) | set(told["keys"]["val"]) == nine
    assert told["counts"] == {"train": 11, "test": 6, "val": 3} and told["require"] == ["text", "image", "audio"]
    for part in ("train", "val", "test"):
        reader = ShardReader(tmp_path / "out" / part)
        wanted = set(KEYS) - nine if part == "train" else set(told["keys"][part])
        assert same(records_of(reader), [record for record in records_of(ShardReader(folder)) if record.key in wanted])
        assert reader.manifest.split == FrozenPart("ours-6", part, keys_sha256(wanted))
        verify(VerifyConfig(reader.folder, deep=True))
    assert told["sha256"]["test"] == hashlib.sha256(("\n".join(told["keys"]["test"]) + "\n").encode()).hexdigest()
    assert [shard.records for shard in ShardReader(tmp_path / "out" / "train").manifest.shards] == [8, 3]


def test_the_order_of_the_shards_changes_nothing_and_more_records_little(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "turned", [RECORDS[::-1]])
    more = [full_record(f"new{number}", number) for number in range(4)]
    write_folder(tmp_path / "more", [[*RECORDS, *more]])
    chosen = {}
    for name in ("all", "turned", "more"):
        split(SplitConfig(tmp_path / name, tmp_path / f"{name}-split", test=8))
        chosen[name] = set(read_split(tmp_path / f"{name}-split" / FILE).keys["test"])
    assert chosen["turned"] == chosen["all"]
    assert {key for key in chosen["more"] if key in KEYS} < chosen["all"]
    split(SplitConfig(folder, tmp_path / "named", test=8, name="another"))
    assert set(read_split(tmp_path / "named" / FILE).keys["test"]) != chosen["all"]


def test_only_records_with_all_modalities_in_one_narration_are_held_out(tmp_path: Path) -> None:
    told, spoken = (full_record("a", 0).narrations[0] for _ in range(2))
    apart = dataclasses.replace(full_record("apart", 1), narrations=(
        Narration("0", told.caption), dataclasses.replace(spoken, caption=None)))
    mute = dataclasses.replace(full_record("mute", 2), narrations=(Narration("0", "quiet"),))
    write_folder(tmp_path / "all", [[full_record("whole", 0), apart, mute]])
    with pytest.raises(UserError, match="1 of 3 records of .* have text and image and audio"):
        split(SplitConfig(tmp_path / "all", tmp_path / "out", test=2))
    split(SplitConfig(tmp_path / "all", tmp_path / "out", test=1))
    assert read_split(tmp_path / "out" / FILE).keys["test"] == ["whole"]
    split(SplitConfig(tmp_path / "all", tmp_path / "seen", test=3, require=("text", "image")))
    assert not (tmp_path / "seen" / "train").exists(), "nothing is left to train on"


def test_the_same_split_again_from_another_extraction(folder: Path, tmp_path: Path) -> None:
    split(SplitConfig(folder, tmp_path / "first", test=6, val=2))
    frozen = read_split(tmp_path / "first" / FILE)
    write_folder(tmp_path / "other", [[full_record(key, 50) for key in KEYS[::-1]]], int8=True)
    split(SplitConfig(tmp_path / "other", tmp_path / "again", file=tmp_path / "first" / FILE))
    assert read_split(tmp_path / "again" / FILE) == frozen
    parts = [ShardReader(tmp_path / name / "test").manifest.split for name in ("first", "again")]
    assert parts[0] == parts[1] and parts[0].sha256 == frozen.sha256["test"]

    lost = frozen.keys["test"][0]
    write_folder(tmp_path / "less", [[full_record(key, 50) for key in KEYS if key != lost]])
    config = SplitConfig(tmp_path / "less", tmp_path / "lesser", file=tmp_path / "first" / FILE)
    with pytest.raises(UserError, match=f"lacks 1 of 8 keys .* '{lost}' .*--incomplete"):
        split(config)
    split(dataclasses.replace(config, incomplete=True))
    made = ShardReader(tmp_path / "lesser" / "test").manifest
    assert made.records == 5 and made.split.sha256 == keys_sha256(frozen.keys["test"][1:])


def test_it_goes_on_where_it_was_stopped_and_refuses_another_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(SplitConfig(folder, tmp_path / "whole", test=6))
    copied = []

    def stop(*arguments: object) -> None:
        copied.append(arguments)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = derive._copy
    monkeypatch.setattr(derive, "_copy", stop)
    with pytest.raises(KeyboardInterrupt):
        split(SplitConfig(folder, tmp_path / "out", test=6))
    monkeypatch.setattr(derive, "_copy", real)
    with pytest.raises(UserError, match="was begun with"):
        split(SplitConfig(folder, tmp_path / "out", test=7))
    split(SplitConfig(folder, tmp_path / "out", test=6))
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_two_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "out", tmp_path / "out" / "train"):
        with alone(place), pytest.raises(UserError, match="another job is writing here"):
            split(SplitConfig(folder, tmp_path / "out", test=6))


def test_what_is_derived_keeps_its_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, keys in (("one", "ab"), ("two", "cd")):
        write_folder(tmp_path / name, [[full_record(key, 0) for key in keys]], origins=(Origin(name, "train"),))
    merge(MergeConfig(tmp_path / "both", (tmp_path / "one", tmp_path / "two")))
    assert ShardReader(tmp_path / "both").manifest.origins == (Origin("one", "train"), Origin("two", "train"))
    split(SplitConfig(tmp_path / "both", tmp_path / "out", test=1, name="s"))
    test, train = (ShardReader(tmp_path / "out" / part).manifest for part in ("test", "train"))
    assert test.origins == train.origins == (Origin("one", "train"), Origin("two", "train"))
    inspect(InspectConfig(tmp_path / "out" / "test", number=0))
    said = capsys.readouterr().out
    assert "records of one train, two train" in said and "part test of the frozen split s" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [({"test": 0}, "--test 0"), ({"val": -1}, "--val -1"), ({"test": 18, "val": 3}, "20 of 20 records"),
     ({"name": " "}, "--name"), ({"incomplete": True}, "--incomplete"), ({"test": 21}, "hold out fewer")],
)
def test_wrong_words_are_sentences(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        split(dataclasses.replace(SplitConfig(folder, tmp_path / "out", test=2), **change))


def test_an_edited_split_is_refused(folder: Path, tmp_path: Path) -> None:
    split(SplitConfig(folder, tmp_path / "out", test=2))
    path = tmp_path / "out" / FILE
    with pytest.raises(UserError, match="says it already"):
        split(SplitConfig(folder, tmp_path / "again", test=3, file=path))
    told = json.loads(path.read_text())
    told["keys"]["test"][0] = "k-1"
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="not those that were written"):
        split(SplitConfig(folder, tmp_path / "again", file=path))
    path.write_text("[]")
    with pytest.raises(UserError, match="split.json"):
        split(SplitConfig(folder, tmp_path / "again", file=path))
    with pytest.raises(UserError, match="is not there"):
        split(SplitConfig(folder, tmp_path / "again", file=tmp_path / "none.json"))


def test_a_file_that_is_no_split_is_refused(folder: Path, tmp_path: Path) -> None:
    split(SplitConfig(folder, tmp_path / "out", test=5, val=2))
    whole = json.loads((tmp_path / "out" / FILE).read_text())
    both = {"test": whole["keys"]["test"], "val": whole["keys"]["test"][:2]}
    for change, said in (
        ({"keys": both, "sha256": {part: keys_sha256(keys) for part, keys in both.items()}}, "both in test and in val"),
        ({"name": "two\nlines"}, "is no name"),
        ({"keys": {"test": ["\ud800"]}}, "not those that were written"),
    ):
        (tmp_path / "split.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=said):
            read_split(tmp_path / "split.json")
    write_folder(tmp_path / "strangers", [[full_record(f"new{number}", number) for number in range(4)]])
    with pytest.raises(UserError, match="has none of the 5 test keys"):
        split(SplitConfig(tmp_path / "strangers", tmp_path / "no", file=tmp_path / "out" / FILE, incomplete=True))
    assert not (tmp_path / "no").exists()
