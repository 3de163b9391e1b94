"""docs/bad-input.md, "Rows": each kind of broken line goes through a job and becomes the failure that the page says.

The others keep their places and their bytes.
"""

import json
import re
from pathlib import Path

import pytest
from jobs import config, write_corpus

from feature_extract.job import extract
from opt.config import UserError
from opt.data.manifest import read_manifest
from opt.data.shards import ShardReader
from opt.data.stored import StoredShard

PAGE = (Path(__file__).parents[2] / "docs" / "bad-input.md").read_text()


def rows() -> dict[str, str]:
    """What comes in -> the reason."""
    text = re.search(r"^## Rows\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {kind: reason.strip("`") for kind, _, reason in table[2:]}


def line(**fields) -> bytes:
    """Line 4 of the corpus, picture p4, with other fields."""
    good = {"dataset_id": "made_up", "image_id": "p4", "annotator_id": 4, "traces": [[]], "timed_caption": [],
            "caption": "Telling 4 of picture 4.", "voice_recording": "train/r4.flac"}
    return json.dumps({name: value for name, value in (good | fields).items() if value is not None}).encode()


LINES = {
    "a line that is not JSON, or cut": [line()[:60]],
    "a line that is not UTF-8": [line().replace(b"Telling", b"\xff\xfe")],
    "a line with a field missing, or of another kind": [line(caption=None)],
    "a line of more than 16 MiB": [line(caption="x" * (2**24 + 1))],
    "a path that leads out of the corpus": [line(voice_recording="../../etc/passwd")],
    "a picture's name that leads out of the corpus": [line(image_id="../../etc/passwd")],
    "half a surrogate pair in a caption": [line(caption="broken \ud800")],
    "a caption of spaces": [line(caption="   ")],
    "a caption of 70,000 words": [line(caption="word " * 70_000)],
    "a name of 300 letters": [line(image_id="p" * 300)],
    "a name with a NUL": [line(image_id="p\0")],
    "the same line twice": [line(), line()],
    "two pictures of one key": [line(), line(image_id="p.4")],
    "a number deeper than Python reads": [b"[" * 100_000],
    "a picture that is not there": [line(image_id="nobody")],
    "a recording that is not there": [line(voice_recording="train/nobody.flac")],
}
KEPT = {"the same line twice", "a recording that is not there", "two pictures of one key"}
"""Kinds whose record is there all the same."""


def test_the_page_and_the_tests_name_the_same_kinds():
    assert rows().keys() == LINES.keys()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Key -> stored bytes, when nothing is broken."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder / "corpus")
    return stored(extracted(folder))


def extracted(folder: Path) -> Path:
    extract(config(folder / "corpus", folder / "out", regions="none", codes="none"))
    return folder / "out"


def stored(out: Path) -> dict[str, bytes]:
    found = {}
    for receipt in read_manifest(out).shards:
        with StoredShard(out, receipt) as shard:
            found |= {key: bytes(shard.content(shard.rows(place)[0])) for place, key in enumerate(shard.keys)}
    return found


@pytest.mark.parametrize("kind", LINES)
def test_a_broken_row_is_one_failure_and_shifts_nothing(tmp_path, whole, kind):
    write_corpus(tmp_path / "corpus")
    path = tmp_path / "corpus" / "train_localized_narratives.jsonl"
    lines = path.read_bytes().splitlines()
    if kind == "two pictures of one key":
        whole = {"p-4" if key == "p4" else key: content for key, content in whole.items()}
        (tmp_path / "corpus" / "images" / "p4.jpg").rename(tmp_path / "corpus" / "images" / "p-4.jpg")
        LINES[kind][:] = [line(image_id="p-4"), line(image_id="p.4")]
    path.write_bytes(b"\n".join(lines[:4] + LINES[kind] + lines[5:]) + b"\n")
    out = extracted(tmp_path)
    (failure,) = [json.loads(text) for text in (out / "failures.jsonl").read_text().splitlines()]
    expected = re.escape(rows()[kind]).replace(re.escape("..."), ".+")
    assert re.fullmatch(expected, failure["reason"]), failure
    found = stored(out)
    others = {key: content for key, content in whole.items() if key not in ("p4", "p-4")}
    assert {key: content for key, content in found.items() if key in others} == others
    assert (len(found) == len(whole)) == (kind in KEPT)
    assert {receipt.name: receipt.records for receipt in read_manifest(out).shards} == {
        "00000": 3, "00001": 3 if kind in KEPT else 2, "00002": 2}


def test_a_corpus_without_a_usable_row_is_a_clear_error(tmp_path):
    write_corpus(tmp_path / "corpus")
    path = tmp_path / "corpus" / "train_localized_narratives.jsonl"
    for content in (b"", b"\n\n", b"{\n{\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no usable row"):
            extracted(tmp_path)


def test_keys_are_unique_over_all_shards(tmp_path):
    write_corpus(tmp_path / "corpus")
    reader = ShardReader(extracted(tmp_path))
    assert len(set(reader.keys())) == 8 and len(reader) == 9
