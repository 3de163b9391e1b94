"""The plan: rows of one key come together, paths stay inside, many rows cost little, a second look costs nothing."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from feature_extract.plan import NAME, Row, open_plan
from feature_extract.sources.item import BadRow, Item, NarrationItem
from opt.config import UserError


@dataclass(frozen=True)
class Listed:
    """A source of rows that stand in a JSON file, so that the file's time and size tell of them."""

    corpus: Path
    split: str
    given: tuple = ()

    @property
    def root(self) -> Path:
        return self.corpus

    def files(self) -> list[Path]:
        return [self.corpus / "rows.json"]

    def rows(self):
        (self.corpus / "read").open("a").write("x")
        yield from self.given


def planned(folder: Path, *rows) -> list[Row]:
    (folder / "rows.json").write_text("x")
    plan = open_plan(Listed(folder, "train", rows), "listed", folder, lambda sha256: None)
    found = plan.rows(0, plan.size)
    assert [row for place in range(plan.size) for row in plan.rows(place, place + 1)] == found
    return found


def told(number: int, caption: str = "words", recording: str | None = None) -> NarrationItem:
    return NarrationItem(str(number), caption, recording)


def test_rows_of_one_key_come_together_in_the_place_of_the_first(tmp_path):
    found = planned(
        tmp_path, Item("a", ("a.jpg",), (told(1),)), Item("b", ("b.jpg",), (told(2),)), BadRow("b", "malformed"),
        Item("a", ("a.jpg",), (told(3), told(4))), Item("c", (), (told(5),)), BadRow("b", "malformed"),
    )
    assert [row.item for row in found] == [
        Item("a", ("a.jpg",), (told(1), told(3), told(4))), Item("b", ("b.jpg",), (told(2),)),
        BadRow("b", "malformed"), Item("c", (), (told(5),)), BadRow("b", "malformed")]
    assert not any(row.losses for row in found)


def test_what_cannot_be_joined_is_a_loss(tmp_path):
    found = planned(
        tmp_path, Item("a", ("a.jpg",), (told(1),)), Item("a", ("other.jpg",), (told(2),)),
        Item("a", ("a.jpg",), (told(1),)), Item("b", ("b.jpg",)), Item("b", ("b.jpg",)),
    )
    assert [row.item for row in found] == [Item("a", ("a.jpg",), (told(1),)), Item("b", ("b.jpg",))]
    assert found[0].losses == ("another row has this key and another picture", "the same narration twice")
    assert found[1].losses == ("the same row twice",)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.jpg", "a/../../b.jpg", "a\0b", ".."])
def test_paths_that_lead_out_are_refused_in_their_place(tmp_path, path):
    found = planned(tmp_path, Item("a", (path,)), Item("b", (), (told(1, recording=path),)), Item("c", ("c..d.jpg",)))
    assert [type(row.item) for row in found] == [BadRow, BadRow, Item]
    assert found[0].item.key == "a" and found[0].item.reason.startswith("path leads out of the folder")


def test_any_text_survives(tmp_path):
    item = Item("k", ("https://x.org/a?b=../c",), (told(1, "half \ud800, 'quotes\" \0 \n and 你好"),))
    bad = BadRow("x\ud800", "y")
    assert [row.item for row in planned(tmp_path, item, bad)] == [item, bad]


def test_a_corpus_is_read_once_until_it_changes(tmp_path):
    source = Listed(tmp_path, "train", (Item("a", ("a.jpg",)),))
    (tmp_path / "rows.json").write_text("x")
    plans = [open_plan(source, "listed", tmp_path, lambda sha256: None) for _ in range(2)]
    assert plans[0] == plans[1] and (tmp_path / "read").read_text() == "x"
    os.utime(tmp_path / "rows.json", ns=(1, 1))
    assert open_plan(source, "listed", tmp_path, lambda sha256: None) == plans[0]
    assert (tmp_path / "read").read_text() == "xx"
    assert open_plan(Listed(tmp_path, "val", (BadRow("b", "c"), *source.given)), "listed", tmp_path, str).size == 2


def test_a_plan_that_is_not_agreed_to_replaces_none(tmp_path):
    planned(tmp_path, Item("a", ("a.jpg",)))
    before = (tmp_path / NAME).read_bytes()

    def refuse(sha256: str) -> None:
        raise UserError("another corpus")

    with pytest.raises(UserError, match="another corpus"):
        open_plan(Listed(tmp_path, "val", (Item("b", ("b.jpg",)),)), "listed", tmp_path, refuse)
    assert (tmp_path / NAME).read_bytes() == before and not list(tmp_path.glob(".*.tmp"))


def test_a_damaged_plan_is_made_again(tmp_path):
    before = planned(tmp_path, Item("a", ("a.jpg",)))
    (tmp_path / NAME).write_bytes(b"not a database" * 1000)
    assert planned(tmp_path, Item("a", ("a.jpg",))) == before


@pytest.mark.parametrize("damage", ["DELETE FROM told WHERE number = 1", "UPDATE told SET content = '{'"])
def test_a_plan_without_its_rows_is_damaged(tmp_path, damage):
    (tmp_path / "rows.json").write_text("x")
    source = Listed(tmp_path, "train", (Item("a", ("a.jpg",)), Item("b", ("b.jpg",))))
    plan = open_plan(source, "listed", tmp_path, lambda sha256: None)
    with contextlib.closing(sqlite3.connect(tmp_path / NAME)) as database, database:
        database.execute(damage)
    with pytest.raises(UserError, match="is damaged .* delete it"):
        plan.rows(0, plan.size)


def test_a_split_of_bad_rows_only_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="holds no usable row"):
        planned(tmp_path, BadRow("a", "malformed"))


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """50,000 and 200,000 rows of a kilobyte: 150 MB more to read, and at most a fraction of it more in memory."""
    script = """
import resource, sys
from pathlib import Path
from feature_extract.plan import open_plan
from feature_extract.sources.localized_narratives import Source
open_plan(Source(Path(sys.argv[1]), "train"), "localized_narratives", Path(sys.argv[1]) / "out", lambda sha256: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for rows in (50_000, 200_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        with (folder / "train_localized_narratives.jsonl").open("w") as file:
            for number in range(rows):
                line = {"image_id": f"i{number}", "annotator_id": 1, "caption": "word " * 200}
                file.write(json.dumps(line) + "\n")
        ran = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout))
    assert peaks[1] - peaks[0] < 40_000
