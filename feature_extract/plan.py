"""The plan of a job: all rows of a source in a file, so that a million of them cost no memory and are read only once.

    source.rows() --make_plan--> plan.sqlite --Plan.rows(start, stop)--> the rows of one shard, in any process

Rows of one key are one row of the plan, in the place of the first: narrations add up when they tell of the same
pictures. What cannot be joined is a loss of that row. Whatever leads out of the source's folder is refused here, for
all sources. Tables:

    told    every row of the source: number, which rows it belongs with, its content as JSON
    places  row of the plan -> number of its first row of the source
    about   SHA-256 over the rows, their number, and which files they were read from
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from feature_extract.sources.item import BadRow, Item, NarrationItem, Source
from opt.config import UserError
from opt.files import sync_folder
from opt.progress import Progress, counted, progress

NAME = "plan.sqlite"
FORMAT = 1
CACHE_KIB = 65_536
"""What SQLite keeps of a file in memory; the rest it sorts and looks up on disk."""
PROGRESS_STEP = 1000


@dataclass(frozen=True)
class Row:
    """A row of the plan. losses: why rows of the source that belong here could not be joined to it."""

    item: Item | BadRow
    losses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A plan on disk. Picklable; reads with a connection of its own at each call. sha256: over all rows in order."""

    path: Path
    size: int
    sha256: str

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows start..stop-1 of the plan, all of which it has. Raises UserError when the file is damaged."""
        query = """SELECT places.place, told.content FROM places JOIN told AS first ON first.number = places.number
                   JOIN told ON told.belongs = first.belongs
                   WHERE places.place BETWEEN ? AND ? ORDER BY places.place, told.number"""
        groups: dict[int, list[str]] = {}
        try:
            with contextlib.closing(_open(self.path)) as database:
                for place, content in database.execute(query, (start, stop - 1)):
                    groups.setdefault(place, []).append(content)
            if len(groups) != stop - start:
                raise ValueError(f"{len(groups)} rows where {stop - start} were")
            return [_joined([_decode(content) for content in contents]) for contents in groups.values()]
        except (sqlite3.Error, ValueError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it and run the same command again") from error


def open_plan(source: Source, name: str, out: Path, agree: Callable[[str], None]) -> Plan:
    """The plan in `out`: the one that is there, when the source's files are as they were, or else a new one.

    name: the source's. agree: called with the SHA-256 of the rows before a plan is put in place; may raise.
    Raises UserError when the source cannot be read, or holds no usable row.
    """
    path = out / NAME
    signature = _signature(source, name)
    try:
        about = _about(path)
    except (sqlite3.Error, KeyError, ValueError):  # none, or damaged: it can always be made again
        about = {}
    if about.get("signature") == signature:
        agree(about["sha256"])
    else:
        about = make_plan(source, path, signature, agree)
    return Plan(path, int(about["size"]), about["sha256"])


def make_plan(source: Source, path: Path, signature: str, agree: Callable[[str], None]) -> dict[str, str]:
    """Read the whole source into a plan at `path`; returns its table `about`. Memory does not grow with the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as database:
            about = _fill(database, source, signature)
        agree(about["sha256"])
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(temporary, path)
    except sqlite3.Error as error:
        raise UserError(f"{path}: the plan could not be written ({error}); is there room on the disk?") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return about


def _fill(database: sqlite3.Connection, source: Source, signature: str) -> dict[str, str]:
    database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", "locking_mode = EXCLUSIVE"):
        database.execute(f"PRAGMA {setting}")  # a plan that is cut off is never seen
    database.execute("CREATE TABLE told (number INTEGER PRIMARY KEY, belongs TEXT, content TEXT)")
    database.execute("CREATE TABLE places (place INTEGER PRIMARY KEY, number INTEGER)")
    database.execute("CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT)")
    digest = hashlib.sha256()
    database.execute("BEGIN")
    with progress("plan", unit="rows of the source") as bar:
        database.executemany("INSERT INTO told VALUES (?, ?, ?)", _told(source, digest, bar))
    database.execute("CREATE INDEX together ON told (belongs)")
    firsts = "SELECT min(number) AS first FROM told GROUP BY belongs"
    database.execute(f"INSERT INTO places SELECT row_number() OVER (ORDER BY first) - 1, first FROM ({firsts})")
    (size,) = database.execute("SELECT count(*) FROM places").fetchone()
    good = "SELECT 1 FROM told WHERE belongs >= '+' AND belongs < ','"
    (usable,) = database.execute(f"SELECT EXISTS ({good})").fetchone()
    if not usable:
        first = [_decode(content) for (content,) in database.execute("SELECT content FROM told LIMIT 1")]
        why = f", the first of which: {first[0].reason}" if first and isinstance(first[0], BadRow) else ""
        raise UserError(f"{source.corpus}: the split {source.split!r} holds no usable row; it has "
                        f"{counted(size, 'row')}{why}")
    about = {"format": str(FORMAT), "size": str(size), "sha256": digest.hexdigest(), "signature": signature}
    database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
    database.execute("COMMIT")
    return about


def _told(source: Source, digest: Any, bar: Progress) -> Iterator[tuple[int, str, str]]:
    """Rows of the table `told`. A good row belongs with all others of its key, a bad one stands alone."""
    number = -1
    for number, row in enumerate(source.rows()):
        checked = _inside(row)
        content = _encode(checked)
        digest.update(content.encode("utf-8", "surrogateescape") + b"\n")
        yield number, f"+{checked.key}" if isinstance(checked, Item) else f"-{number}", content
        if number % PROGRESS_STEP == PROGRESS_STEP - 1:
            bar.advance(PROGRESS_STEP)
    bar.advance((number + 1) % PROGRESS_STEP)


def _inside(row: Item | BadRow) -> Item | BadRow:
    """The row itself, or a BadRow where one of its paths leads out of the source's folder."""
    if isinstance(row, BadRow):
        return row
    for path in (*row.pictures, *(told.recording for told in row.narrations if told.recording is not None)):
        if path.startswith(("http://", "https://")):
            continue
        if path.startswith("/") or "\0" in path or (".." in path and ".." in PurePosixPath(path).parts):
            return BadRow(row.key, f"path leads out of the folder ({path!r})")
    return row


def _encode(row: Item | BadRow) -> str:
    """JSON with all but ASCII escaped, so that no text, half a surrogate pair included, can break the file."""
    if isinstance(row, BadRow):
        return json.dumps([row.key, row.reason])
    told = [[narration.narration_id, narration.caption, narration.recording] for narration in row.narrations]
    return json.dumps([row.key, row.pictures, told])


def _decode(content: str) -> Item | BadRow:
    values = json.loads(content)
    if len(values) == 2:
        return BadRow(*values)
    return Item(values[0], tuple(values[1]), tuple(NarrationItem(*told) for told in values[2]))


def _joined(rows: list[Item | BadRow]) -> Row:
    """One row out of all rows of one key: the first one's pictures, every narration once."""
    first = rows[0]
    if isinstance(first, BadRow):
        return Row(first)
    narrations: dict[NarrationItem, None] = {}
    losses: list[str] = []
    for row in rows:
        assert isinstance(row, Item)
        if row.pictures != first.pictures:
            losses.append("another row has this key and another picture")
            continue
        for narration in row.narrations:
            if narration in narrations:
                losses.append("the same narration twice")
            narrations[narration] = None
        if row is not first and not row.narrations:
            losses.append("the same row twice")
    return Row(Item(first.key, first.pictures, tuple(narrations)), tuple(losses))


def _signature(source: Source, name: str) -> str:
    """What the rows depend on: the source's options, and name, size and time of all that it reads them from."""
    options = {option: str(value) for option, value in vars(source).items() if option != "corpus"}
    files = []
    for path in source.files():
        status = path.stat()
        files.append([os.path.relpath(path, source.corpus), status.st_size, status.st_mtime_ns])
    return json.dumps([FORMAT, name, options, files])


def _about(path: Path) -> dict[str, str]:
    with contextlib.closing(_open(path)) as database:
        return dict(database.execute("SELECT name, value FROM about"))


def _open(path: Path) -> sqlite3.Connection:
    """Read only, and without locks: a plan never changes under its name, and network disks lock badly."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
