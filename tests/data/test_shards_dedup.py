"""`opt shards dedup`: copies of test pictures go, whatever their name and size; other pictures stay."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from stored_records import encoded, full_record, noise_jpeg, records_of, same, write_folder

from opt.config import UserError
from opt.data import dedup as dedup_module
from opt.data.dedup import DedupConfig, dedup
from opt.data.near_copies import HASHES, find_copies, picture_hash
from opt.data.record import Narration, Picture, Record
from opt.data.shards import ShardReader
from opt.data.verify import InspectConfig, VerifyConfig, inspect, verify


def shows(key: str, *jpegs: bytes) -> Record:
    record = full_record(key, 0)
    return dataclasses.replace(
        record, pictures=tuple(dataclasses.replace(record.pictures[0], jpeg=jpeg) for jpeg in jpegs)
    )


def large(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(noise_jpeg(seed, (320, 240)))).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    edge = round(image.width * share), round(image.height * share)
    return image.crop((*edge, image.width - edge[0], image.height - edge[1]))


TESTS = [shows(f"t{number}", encoded(large(number))) for number in range(4)]
COPIES = {
    "same": encoded(large(0)),
    "re-encoded": encoded(large(1), quality=30),
    "smaller": encoded(large(2).resize((85, 64))),
    "stretched": encoded(large(2).resize((160, 160))),
    "cropped": encoded(cropped(large(3), 0.02)),
    "brighter": encoded(ImageEnhance.Brightness(large(0)).enhance(1.2)),
    "darker": encoded(ImageEnhance.Brightness(large(1)).enhance(0.7)),
}
OTHERS = {f"other{number}": encoded(large(100 + number)) for number in range(10)}


def dropped(out: Path) -> dict[str, str]:
    return {failure.key: failure.reason for failure in ShardReader(out).manifest.failures}


@pytest.mark.parametrize("int8", [False, True])
def test_copies_go_and_the_rest_stays_as_it_is_stored(
    tmp_path: Path, int8: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [shows(key, jpeg) for key, jpeg in {**COPIES, **OTHERS}.items()]
    records.insert(3, shows("second picture", encoded(large(50)), COPIES["smaller"]))
    records.insert(4, Record("words", (), (Narration("0", "Only words."),)))
    write_folder(tmp_path / "train", [records[:6], records[6:]], int8)
    write_folder(tmp_path / "test", [TESTS[:2], TESTS[2:]])
    dedup(DedupConfig(tmp_path / "train", (tmp_path / "test",), tmp_path / "out"))
    gone = dropped(tmp_path / "out")
    assert set(gone) == {*COPIES, "second picture"}
    assert gone["same"] == "dropped: exact copy of a test picture (test/t0)"
    assert gone["re-encoded"].startswith("dropped: near copy of a test picture (test/t1, distance ")
    assert "test/t2" in gone["second picture"]
    kept = [record for record in records_of(ShardReader(tmp_path / "train")) if record.key not in gone]
    assert same(records_of(ShardReader(tmp_path / "out")), kept)
    verify(VerifyConfig(tmp_path / "out", deep=True))
    assert "dropped 8 of 19 records, 11 remain\n         1  exact copy" in capsys.readouterr().out
    inspect(InspectConfig(tmp_path / "out", number=0))
    assert "7  dropped: near copy of a test picture\n" in capsys.readouterr().out


def test_names_say_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [[shows("t0", OTHERS["other1"])]])
    write_folder(tmp_path / "test", [TESTS])
    dedup(DedupConfig(tmp_path / "train", (tmp_path / "test",), tmp_path / "out"))
    assert ShardReader(tmp_path / "out").manifest.records == 1


def test_several_test_folders_and_the_nearest_of_their_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [[shows("k", COPIES["same"]), shows("l", TESTS[3].pictures[0].jpeg or b"")]])
    write_folder(tmp_path / "one", [[shows("near", COPIES["brighter"]), *TESTS[1:3]]])
    write_folder(tmp_path / "two", [[TESTS[3]], [shows("far", OTHERS["other0"]), TESTS[0]]])
    dedup(DedupConfig(tmp_path / "train", (tmp_path / "one", tmp_path / "two"), tmp_path / "out"))
    assert dropped(tmp_path / "out") == {
        "k": "dropped: exact copy of a test picture (two/t0)",
        "l": "dropped: exact copy of a test picture (two/t3)",
    }


def test_a_dry_run_lists_and_the_run_itself_does_not_hash_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "train", [[shows(*pair) for pair in COPIES.items()], [shows("stays", OTHERS["other0"])]])
    write_folder(tmp_path / "test", [TESTS])
    config = DedupConfig(tmp_path / "train", (tmp_path / "test",), tmp_path / "out", workers=1)
    dedup(dataclasses.replace(config, dry_run=True))
    shown = capsys.readouterr().out
    assert "same: dropped: exact copy of a test picture (test/t0)\n" in shown and "would drop 7 of 8 records" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"hashes", ".lock"}
    monkeypatch.setattr(dedup_module, "picture_hash", None)
    dedup(config)
    dedup(config)
    assert len(dropped(tmp_path / "out")) == 7
    with pytest.raises(UserError, match="begun with distance 12; now it is distance 3"):
        dedup(dataclasses.replace(config, distance=3))


def test_pictures_that_cannot_be_compared(tmp_path: Path) -> None:
    broken = shows("broken", b"this is no picture")
    write_folder(tmp_path / "test", [TESTS])
    write_folder(tmp_path / "bare", [[full_record("without", 1, jpeg=False)]])
    write_folder(tmp_path / "words", [[Record("words", (), (Narration("0", "Only words."),))]])
    write_folder(tmp_path / "broken", [[broken, shows("whole", OTHERS["other0"])]])
    with pytest.raises(UserError, match="'without' is stored without its picture; extract again with --jpeg"):
        dedup(DedupConfig(tmp_path / "bare", (tmp_path / "test",), tmp_path / "out1"))
    with pytest.raises(UserError, match="'without' is stored without its picture"):
        dedup(DedupConfig(tmp_path / "test", (tmp_path / "bare",), tmp_path / "out2"))
    with pytest.raises(UserError, match="hold no picture"):
        dedup(DedupConfig(tmp_path / "test", (tmp_path / "words",), tmp_path / "out3"))
    with pytest.raises(UserError, match="the picture of 'broken' cannot be read"):
        dedup(DedupConfig(tmp_path / "test", (tmp_path / "broken",), tmp_path / "out4"))
    dedup(DedupConfig(tmp_path / "broken", (tmp_path / "test",), tmp_path / "out5"))
    assert dropped(tmp_path / "out5") == {"broken": "dropped: picture not readable"}


def test_values_out_of_range_are_a_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [[shows("k", OTHERS["other0"])]])
    config = DedupConfig(tmp_path / "train", (tmp_path / "train",), tmp_path / "out")
    for change, message in (({}, "is one of those"), ({"distance": 21}, "--distance 21"), ({"workers": 0}, "--workers"),
                            ({"out": tmp_path / "train"}, "one of the folders that are read"),
                            ({"against": ()}, "--against names no folder")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            dedup(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no hashes", encoded(large(0))])
def test_hashes_that_are_damaged_or_unfinished(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path / "train", [[shows("k", OTHERS["other0"])]])
    write_folder(tmp_path / "test", [TESTS])
    config = DedupConfig(tmp_path / "train", (tmp_path / "test",), tmp_path / "out")
    dedup(config)
    hashes = tmp_path / "out" / "hashes"
    first = sorted(hashes.iterdir())[0]
    first.write_bytes(content)
    (hashes / f".{first.name}.0123abcd.tmp").write_bytes(b"left by a kill")
    with pytest.raises(UserError, match="is damaged .* delete it"):
        dedup(config)
    assert not list(hashes.glob(".*"))
    first.unlink()
    dedup(config)


def test_the_search_finds_what_a_plain_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tests, pictures = random_hashes(rng, 40), random_hashes(rng, 300)
    for number in range(0, 300, 3):  # a test picture with some bits turned
        other = tests[rng.integers(40)]
        pictures["coarse"][number] = other["coarse"] ^ bits(rng, int(rng.integers(20)))
        pictures["fine"][number] = other["fine"]
        for _ in range(int(rng.integers(70))):
            pictures["fine"][number, rng.integers(4)] ^= bits(rng, 1)
        pictures["pixels"][number] = other["pixels"] if number % 2 else 1
    pictures["readable"][::30] = False
    expected = {}
    for place, picture in enumerate(pictures):
        near = []
        for number, test in enumerate(tests):
            coarse = (int(picture["coarse"]) ^ int(test["coarse"])).bit_count()
            fine = sum((int(a) ^ int(b)).bit_count() for a, b in zip(picture["fine"], test["fine"], strict=True))
            if coarse <= 10 and fine <= 40 and picture["readable"]:
                near.append((picture["pixels"] != test["pixels"], fine, number, coarse))
        if near:
            different, _, number, coarse = min(near)
            expected[place] = (number, coarse, not different)
    assert 20 < len(expected) < 100
    for pairs in (1, 1000, 1 << 20):
        monkeypatch.setattr("opt.data.near_copies.PAIRS", pairs)
        found = find_copies(pictures, tests, 10)
        assert {int(p): (int(t), int(d), bool(e)) for p, t, d, e in zip(*found, strict=True)} == expected
    assert not len(find_copies(pictures[:0], tests, 10).picture) and not len(find_copies(pictures, tests[:0], 10).test)


def random_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    table = np.frombuffer(rng.bytes(count * HASHES.itemsize), HASHES).copy()
    table["readable"] = True
    return table


def bits(rng: np.random.Generator, count: int) -> np.uint64:
    return np.uint64(sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)))


def test_the_hash_is_imagehash_s() -> None:
    import imagehash

    image = large(3)
    readable, _, coarse, fine = picture_hash(encoded(image))
    shown = Image.open(io.BytesIO(encoded(image)))
    assert readable
    assert coarse.to_bytes(8, "little") == bytes.fromhex(str(imagehash.phash(shown)))
    assert b"".join(part.to_bytes(8, "little") for part in fine) == bytes.fromhex(str(imagehash.phash(shown, 16)))
    assert picture_hash(b"nothing") == (False, 0, 0, (0, 0, 0, 0))


def test_scenes_that_share_a_ground_are_not_taken_for_copies() -> None:
    from feature_extract.sources.spoken_scenes import draw

    table = np.array([(n, *picture_hash(encoded(draw(0, n).picture()))) for n in range(250)], HASHES)
    coarse = np.bitwise_count(table["coarse"][:, None] ^ table["coarse"])
    assert (coarse[np.triu_indices(250, 1)] <= 12).sum() > 5  # the coarse hash alone would take them
    for number in range(250):
        others = np.delete(table, number)
        assert not len(find_copies(table[number : number + 1], others, 12).picture)


def test_flat_pictures_are_copies_of_flat_pictures_only() -> None:
    flat = [encoded(Image.new("RGB", (64, 48), colour)) for colour in ("white", "white")]
    table = np.array([(n, *picture_hash(jpeg)) for n, jpeg in enumerate([*flat, *OTHERS.values()])], HASHES)
    assert find_copies(table[:1], table[1:], 12).test.tolist() == [0]
    assert not len(find_copies(table[2:], table[:2], 12).picture)


def test_equal_pixels_in_another_shape_are_no_exact_copy() -> None:
    pictures = [encoded(Image.new("RGB", size, "white")) for size in ((64, 48), (48, 64), (64, 48))]
    pixels = [picture_hash(picture)[1] for picture in pictures]
    assert pixels[0] == pixels[2] != pixels[1]


def test_a_picture_of_a_record_without_features_is_compared_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [[Record("k", (Picture(320, 240, jpeg=COPIES["same"]),))]])
    write_folder(tmp_path / "test", [TESTS])
    dedup(DedupConfig(tmp_path / "train", (tmp_path / "test",), tmp_path / "out"))
    assert set(dropped(tmp_path / "out")) == {"k"}
