"""`opt download open-images` against a server of the same layout that does everything servers do."""

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bucket
import pytest

from feature_extract.download import files, open_images
from feature_extract.download.open_images import DownloadConfig, download
from feature_extract.download.stream import stream
from feature_extract.fetch import Patience
from opt.config import UserError
from opt.files import sha256

QUICK = Patience(connect=1, read=0.3, total=5, tries=3, first_wait=0.01, longest_wait=2)
PICTURES = 24
FIRST = "/ln/annotations/open_images_train_v6_localized_narratives-00000-of-00010.jsonl"


def line(number: int, annotator: int = 0) -> bytes:
    trace = [{"x": 0.1, "y": 0.2, "t": index / 100} for index in range(900)]
    entry = {"dataset_id": "open_images_train", "image_id": f"{number:016x}", "annotator_id": annotator,
             "caption": f"Picture {number} .", "traces": [trace], "timed_caption": [],
             "voice_recording": f"open_images_train/open_images_train_{number:016x}_{annotator}.ogg"}
    return json.dumps(entry).encode() + b"\n"


@pytest.fixture
def web(monkeypatch):
    """24 pictures in two of ten annotation files; the third picture has two narrations."""
    monkeypatch.setenv("OPT_FETCH_HOSTS", "127.0.0.1")
    with bucket.serving() as server:
        monkeypatch.setattr(open_images, "ANNOTATIONS", f"{server.url}/ln/annotations")
        monkeypatch.setattr(open_images, "RECORDINGS", f"{server.url}/ln/voice-recordings")
        monkeypatch.setattr(open_images, "PICTURES", f"{server.url}/oi")
        monkeypatch.setitem(open_images.NARRATIONS, "train", PICTURES)  # so that no test asks for the room of them all
        lines = [line(number, number % 3) for number in range(PICTURES)]
        lines.insert(3, line(2, 7))
        server.files[FIRST] = b"".join(lines[:13])
        server.files[FIRST.replace("00000-of", "00001-of")] = b"".join(lines[13:])
        for number in range(2, 10):
            server.files[FIRST.replace("00000-of", f"{number:05}-of")] = b""
        for content in lines:
            entry = json.loads(content)
            server.files[f"/oi/train/{entry['image_id']}.jpg"] = b"picture " + entry["image_id"].encode() * 50
            server.files[f"/ln/voice-recordings/{entry['voice_recording']}"] = entry["voice_recording"].encode() * 30
        yield server


def config(out: Path, n: int = 10, **options) -> DownloadConfig:
    return DownloadConfig(out / "corpus", n=n, connections=2, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """The corpus itself: lines, pictures, recordings."""
    kept = ("train_localized_narratives.jsonl", "images/", "voice/")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.startswith(kept)}


def missing(out: Path) -> list[dict[str, str]]:
    return [json.loads(text) for text in (out / "corpus" / "missing.jsonl").read_text().splitlines()]


def gets(web: bucket.Bucket) -> list[str]:
    return [asked for asked in web.asked if asked.startswith("GET")]


def test_a_fresh_download_has_the_layout(web, tmp_path, capsys):
    download(config(tmp_path), QUICK)
    got = contents(tmp_path / "corpus")
    lines = got.pop("train_localized_narratives.jsonl").splitlines(keepends=True)
    assert lines == web.files[FIRST].splitlines(keepends=True)[:11], "ten pictures, one of them told twice"
    for text in lines:
        entry = json.loads(text)
        image_id, voice = entry["image_id"], entry["voice_recording"]
        assert got[f"images/{image_id}.jpg"] == web.files[f"/oi/train/{image_id}.jpg"]
        assert got[f"voice/{voice}"] == web.files[f"/ln/voice-recordings/{voice}"]
    assert len(got) == 21 and not missing(tmp_path)
    receipts = [json.loads(text) for text in (tmp_path / "corpus" / "receipts.jsonl").read_text().splitlines()]
    assert len(receipts) == 21
    for receipt in receipts:
        assert receipt["sha256"] == sha256(tmp_path / "corpus" / receipt["file"]) and receipt["checked"] == "md5"
    said = capsys.readouterr().out
    assert "train: 10 pictures and about 11 recordings, about" in said and "21 of 21 files are there" in said
    assert Counter(gets(web)).most_common()[0][1] <= 2, "one survey, one download of the annotations' head"


def test_a_second_run_fetches_nothing(web, tmp_path):
    download(config(tmp_path), QUICK)
    before = contents(tmp_path / "corpus")
    web.asked.clear()
    download(config(tmp_path), QUICK)
    assert web.asked == [] and contents(tmp_path / "corpus") == before


def test_more_pictures_later_are_the_same_as_all_at_once(web, tmp_path):
    download(config(tmp_path / "steps", 4), QUICK)
    web.asked.clear()
    download(config(tmp_path / "steps", 20), QUICK)
    assert any(re.fullmatch(rf"GET {FIRST} bytes=\d+-", asked) for asked in web.asked), "goes on where it stopped"
    download(config(tmp_path / "whole", 20), QUICK)
    assert contents(tmp_path / "steps" / "corpus") == contents(tmp_path / "whole" / "corpus")


def test_all_of_a_split_checks_the_annotations(web, tmp_path):
    download(config(tmp_path, 0), QUICK)
    got = contents(tmp_path / "corpus")
    assert len(got["train_localized_narratives.jsonl"].splitlines()) == PICTURES + 1
    assert len(got) == 1 + PICTURES + PICTURES + 1
    kept = {path.name for path in (tmp_path / "corpus" / "annotations").iterdir()}
    assert kept == {Path(FIRST).name.replace("00000-of", f"{number:05}-of") for number in range(10)}


def test_a_cut_in_the_middle_of_the_annotations_goes_on_there(web, tmp_path):
    web.faults[FIRST] = [bucket.cut(0.3)]
    download(config(tmp_path), QUICK)
    assert sum(asked.startswith(f"GET {FIRST} bytes=") for asked in web.asked) >= 1
    assert missing(tmp_path) == []
    download(config(tmp_path / "calm"), QUICK)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "calm" / "corpus")


def test_a_run_that_died_is_gone_on_with(web, tmp_path):
    web.faults[FIRST] = [bucket.cut(0.3), *[bucket.status(500)] * 3]
    with pytest.raises(UserError, match="the buckets of Open Images: server error .* run the same command again"):
        download(config(tmp_path), QUICK)
    part = tmp_path / "corpus" / "annotations" / f"{Path(FIRST).name}.part"
    there = part.stat().st_size
    assert there > 0.25 * len(web.files[FIRST])
    web.asked.clear()
    download(config(tmp_path), QUICK)
    assert gets(web)[0] == f"GET {FIRST} bytes={there}-"
    download(config(tmp_path / "calm"), QUICK)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "calm" / "corpus")


def test_a_server_without_range(web, tmp_path):
    web.ranges = False
    web.faults[FIRST] = [bucket.cut(0.3), bucket.cut(0.6)]
    download(config(tmp_path), QUICK)
    lines = (tmp_path / "corpus" / "train_localized_narratives.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == web.files[FIRST].splitlines(keepends=True)[:11]


def test_annotations_that_change_are_begun_anew(web, tmp_path, monkeypatch):
    monkeypatch.setattr(open_images, "SURVEYED", 2)
    download(config(tmp_path, 2), QUICK)
    web.files[FIRST] = b"".join(line(number + 100) for number in range(12))
    for number in range(12):
        web.files[f"/oi/train/{number + 100:016x}.jpg"] = b"new"
        web.files[f"/ln/voice-recordings/open_images_train/open_images_train_{number + 100:016x}_0.ogg"] = b"new"
    download(config(tmp_path, 8), QUICK)
    lines = (tmp_path / "corpus" / "train_localized_narratives.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == web.files[FIRST].splitlines(keepends=True)[:8]


def test_damaged_annotations_are_not_kept(web, tmp_path):
    web.faults[FIRST] = [bucket.flipped] * 2
    with pytest.raises(UserError, match="damaged on the way"):
        download(config(tmp_path, 0), QUICK)
    assert not list((tmp_path / "corpus" / "annotations").glob("*00000*"))
    download(config(tmp_path, 0), QUICK)
    assert missing(tmp_path) == []


def test_what_is_not_there_ends_nothing_and_is_listed(web, tmp_path, capsys):
    del web.files[f"/oi/train/{3:016x}.jpg"]
    download(config(tmp_path), QUICK)
    assert missing(tmp_path) == [{"file": f"images/{3:016x}.jpg", "reason": "missing file (HTTP 404)"}]
    assert "20 of 21 files are there" in (said := capsys.readouterr()).out and "1 missing file" in said.out
    web.files[f"/oi/train/{3:016x}.jpg"] = b"late"
    web.asked.clear()
    download(config(tmp_path), QUICK)
    assert missing(tmp_path) == [] and gets(web) == [f"GET /oi/train/{3:016x}.jpg"]


@pytest.mark.parametrize(
    "faults",
    [[bucket.status(429, Retry_After="1")], [bucket.status(503)] * 2, [bucket.cut()], [bucket.silent(0.5)],
     [bucket.flipped]],
)
def test_faults_that_pass(web, tmp_path, faults):
    web.faults[f"/oi/train/{5:016x}.jpg"] = faults
    download(config(tmp_path), QUICK)
    assert missing(tmp_path) == []
    assert contents(tmp_path / "corpus")[f"images/{5:016x}.jpg"] == web.files[f"/oi/train/{5:016x}.jpg"]


def test_a_wrong_checksum_is_a_failure_in_the_end(web, tmp_path):
    web.faults[f"/oi/train/{5:016x}.jpg"] = [bucket.flipped] * 2
    download(config(tmp_path), QUICK)
    assert missing(tmp_path) == [{"file": f"images/{5:016x}.jpg", "reason": "damaged on the way (md5 differs)"}]
    assert not (tmp_path / "corpus" / "images" / f"{5:016x}.jpg").exists()


def test_faults_that_may_pass_later_are_an_error_of_the_run(web, tmp_path):
    web.faults[f"/oi/train/{5:016x}.jpg"] = [bucket.silent(0.5)] * 3
    with pytest.raises(UserError, match="1 files are missing.*1 server too slow.*run the same command again"):
        download(config(tmp_path), QUICK)
    download(config(tmp_path), QUICK)
    assert missing(tmp_path) == []


def test_a_server_that_is_down_is_left_alone(web, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STOP_AFTER", 3)
    monkeypatch.setattr(open_images, "STOP_AFTER", 3)
    for path in web.files:
        if not path.startswith("/ln/annotations"):
            web.faults[path] = [bucket.status(500)] * 9
    with pytest.raises(UserError, match="the server seems to be down"):
        download(config(tmp_path), QUICK)
    assert sum(asked.startswith("GET /oi") or "voice" in asked for asked in gets(web)) < 3 * 12


def test_files_that_shrank_or_have_no_receipt_are_fetched_again(web, tmp_path):
    download(config(tmp_path), QUICK)
    folder = tmp_path / "corpus"
    (folder / "images" / f"{1:016x}.jpg").write_bytes(b"cut")
    lines = (folder / "receipts.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "receipts.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # a kill while it was written
    (folder / "images" / ".x.jpg.1234.tmp").write_bytes(b"half")
    web.asked.clear()
    download(config(tmp_path), QUICK)
    assert set(gets(web)) == {f"GET /oi/train/{1:016x}.jpg", f"GET {json.loads(lines[-1])['url'][len(web.url):]}"}
    download(config(tmp_path / "calm"), QUICK)
    assert contents(folder) == contents(tmp_path / "calm" / "corpus")
    web.asked.clear()
    download(config(tmp_path), QUICK)
    assert web.asked == [], "the torn line did not spoil those after it"


def test_kills_at_any_moment(web, tmp_path):
    """SIGKILL, run again, six times; then to the end: the corpus of a run that nobody disturbed."""
    for path in web.files:
        web.faults[path] = [bucket.late(0.02)] * 30
    code = f"""
from pathlib import Path
from feature_extract.download import open_images
open_images.ANNOTATIONS, open_images.RECORDINGS = {open_images.ANNOTATIONS!r}, {open_images.RECORDINGS!r}
open_images.PICTURES = {open_images.PICTURES!r}
print("begun", flush=True)
open_images.download(open_images.DownloadConfig(Path({str(tmp_path / "corpus")!r}), n=20, connections=2))
"""
    moments = random.Random(0)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            run.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.25))
            run.kill()
    download(config(tmp_path, 20), QUICK)
    download(config(tmp_path / "calm", 20), QUICK)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "calm" / "corpus")
    assert not list((tmp_path / "corpus").rglob("*.tmp"))


def test_a_kill_before_the_whole_file_got_its_name(web, tmp_path):
    content, path = web.files[FIRST], tmp_path / "lines.jsonl"
    version = {"validator": '"x"', "bytes": len(content), "sums": {"md5": hashlib.md5(content).hexdigest()}}
    (tmp_path / "lines.jsonl.part").write_bytes(content)
    (tmp_path / "lines.jsonl.version").write_text(json.dumps(version))
    assert b"".join(stream(web.url + FIRST, path, QUICK)) == content and path.read_bytes() == content
    assert web.asked == [] and [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


def test_the_source_reads_what_came(web, tmp_path):
    from feature_extract.sources.localized_narratives import Source

    download(config(tmp_path), QUICK)
    source = Source(tmp_path / "corpus")
    rows = list(source.rows())
    assert len(rows) == 11
    for row in rows:
        for name in (*row.pictures, *(narration.recording for narration in row.narrations)):
            assert (source.root / name).is_file()


def test_only_some_annotators(web, tmp_path):
    download(config(tmp_path, 4, annotators=(1, 7)), QUICK)
    lines = (tmp_path / "corpus" / "train_localized_narratives.jsonl").read_bytes().splitlines()
    assert [json.loads(text)["annotator_id"] for text in lines] == [1, 7, 1, 1]


def test_lines_that_would_lead_elsewhere_are_left_out(web, tmp_path):
    bad = [b"{not json\n", b'{"image_id": "../../etc/passwd"}\n', b'{"image_id": ".hidden"}\n', b'{"image_id": 5}\n',
           b"[1]\n", b'{"image_id": "a", "voice_recording": "/etc/passwd"}\n', b'{"image_id": "a?b"}\n', b"\xff\n"]
    web.files[FIRST] = b"".join(bad) + web.files[FIRST]
    download(config(tmp_path), QUICK)
    assert [entry["file"] for entry in missing(tmp_path)] == [f"annotation line {number + 1}" for number in range(8)]
    assert len(contents(tmp_path / "corpus")) == 22


def test_a_dry_run_writes_nothing(web, tmp_path, capsys):
    download(config(tmp_path, 0, dry_run=True), QUICK)
    assert not (tmp_path / "corpus").exists()
    said = capsys.readouterr().out
    assert "train: 24 pictures" in said and "MB with the annotations (judged by the first 16 pictures)" in said
    assert not [asked for asked in gets(web) if "annotations" not in asked]


def test_a_disk_that_is_too_small_is_said_before(web, tmp_path, monkeypatch):
    monkeypatch.setattr(open_images.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(UserError, match="still to come and 1.0 kB are free; choose a smaller --n"):
        download(config(tmp_path), QUICK)
    assert not [asked for asked in gets(web) if "annotations" not in asked]


@pytest.mark.parametrize("wrong", [{"n": -1}, {"connections": 0}])
def test_numbers_that_make_no_sense(tmp_path, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        DownloadConfig(tmp_path, **wrong)


def test_the_published_files():
    """The names as the corpus' page links them."""
    assert len(open_images.ANNOTATION_FILES["train"]) == 10
    assert open_images.ANNOTATION_FILES["train"][9] == "open_images_train_v6_localized_narratives-00009-of-00010.jsonl"
    assert open_images._url("test", "images/ab.jpg") == "https://open-images-dataset.s3.amazonaws.com/test/ab.jpg"
    recording = open_images._url("train", "voice/open_images_train/ab_0.ogg")
    assert recording.endswith("/localized-narratives/voice-recordings/open_images_train/ab_0.ogg")
