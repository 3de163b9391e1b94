"""`opt shards export webdataset`: what WebDataset reads is what was stored."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stored_records import full_record, records_of, write_folder

from opt.config import UserError
from opt.data import export as export_module
from opt.data.encoding import named_arrays
from opt.data.export import ExportConfig, export
from opt.data.record import Narration, Record

STORED = [
    full_record("zebra", 0), full_record("é ü", 1, pictures=3, narrations=2), full_record("bare", 2, jpeg=False),
    Record("words", (), (Narration("7", "Only words."),)), full_record("last", 4),
]  # fmt: skip


@pytest.mark.parametrize("int8", [False, True])
def test_webdataset_reads_what_was_stored(tmp_path: Path, int8: bool) -> None:
    webdataset = pytest.importorskip("webdataset")
    reader = write_folder(tmp_path / "shards", [STORED[:3], STORED[3:]], int8)
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out", records=2))
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(tars) == 3
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [record.key for record in STORED]
    for sample, record in zip(samples, records_of(reader), strict=True):
        about = sample["json"]
        assert about["key"] == record.key
        assert [(p["width"], p["height"]) for p in about["pictures"]] == [(p.width, p.height) for p in record.pictures]
        told = [(n.narration_id, n.caption, n.frame_rate, n.seconds) for n in record.narrations]
        assert [(n["id"], n["caption"], n["frame_rate"], n["seconds"]) for n in about["narrations"]] == told
        for name, array in named_arrays(record).items():
            part, number, field = name.split(".")
            member = f"{number}.{field}.npy".removeprefix("0.")
            got = sample.pop(member.replace("codes", "speech_codes") if part == "narration" else member)
            assert got.dtype == array.dtype and np.array_equal(got, array)
        for number, picture in enumerate(record.pictures):
            if picture.jpeg is not None:
                shown = sample.pop(f"{number}.jpg".removeprefix("0."))
                assert np.array_equal(np.asarray(shown), np.asarray(Image.open(io.BytesIO(picture.jpeg))))
        assert not [name for name in sample if name != "json" and not name.startswith("__")]


def test_members_are_plain_and_the_ids_are_explained(tmp_path: Path) -> None:
    write_folder(tmp_path / "shards", [STORED])
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        assert {(m.mtime, m.uid, m.mode) for m in tar.getmembers()} == {(0, 0, 0o644)}
        file = tar.extractfile("zebra.speech.npy")
        assert file is not None
        assert np.array_equal(np.load(io.BytesIO(file.read()), allow_pickle=False), STORED[0].narrations[0].speech)
    assert (tmp_path / "out" / "00000.tar").read_bytes()[-1024:] == bytes(1024)
    assert names[:3] == ["zebra.json", "zebra.jpg", "zebra.regions.npy"]
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert facts["region_attributes"] == ["red", "blue"] and facts["speech_codebooks"] == [7, 9]
    assert facts["records"] == 5 and "shards" not in facts


def test_webdataset_reads_shards_as_they_are(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    from safetensors.numpy import load

    write_folder(tmp_path, [STORED])
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [record.key for record in STORED]
    assert samples[1]["2.jpg"].size == (64, 48)
    assert np.array_equal(load(samples[0]["safetensors"])["picture.0.codes"], STORED[0].pictures[0].codes)


def test_an_export_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "shards", [STORED])
    members, seen = export_module.members, []

    def cut_short(record: Record):
        if record.key == "words":
            raise KeyboardInterrupt
        seen.append(record.key)
        return members(record)

    monkeypatch.setattr(export_module, "members", cut_short)
    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out", records=2))
    assert [path.name for path in (tmp_path / "out").glob("[!.]*.tar")] == ["00000.tar"]
    assert not (tmp_path / "out" / "dataset.json").exists()
    monkeypatch.setattr(export_module, "members", lambda record: (seen.append(record.key), members(record))[1])
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out", records=2))
    assert seen == ["zebra", "é ü", "bare", "bare", "words", "last"]
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "whole", records=2))
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "shards", [STORED])
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out"))
    with pytest.raises(UserError, match="begun with records 1000; now it is records 3"):
        export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out", records=3))
    with pytest.raises(UserError, match="--records 0"):
        export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out", records=0))
    with pytest.raises(UserError, match="holds shards without settings.json"):
        export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "shards"))
