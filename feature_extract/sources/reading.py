"""What several sources share: lines, tables and JSON, read so that one bad row stays one bad row.

    file --numbered_lines--> bytes --decode, loads--> entry --field, identifier--> texts | ValueError --> BadRow

A line is read whole, but never more of it than MAX_LINE_BYTES: a file without line ends cannot fill the memory.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from feature_extract.sources.item import BadRow, Item, clean_key
from opt.config import UserError

MAX_LINE_BYTES = 1 << 24
"""A longer line is malformed. Published narrations with their mouse traces stay far below it."""
MAX_REASON = 200
CHUNK_CHARACTERS = 1 << 20
MALFORMED = (ValueError, KeyError, TypeError, IndexError, RecursionError, OSError, csv.Error)
"""What reading a row raises when the row is at fault."""

Kind = TypeVar("Kind", str, list[Any])
_BETWEEN = re.compile(r"[\s,]*")


def bad_row(where: str, error: Exception) -> BadRow:
    """The row at `where`, which is FILE:LINE, that cannot be read because of `error`: told alike wherever it lies."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = f"malformed line ({type(error).__name__}: {why[:MAX_REASON]})"
    key, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (where, reason))
    return BadRow(key, reason)


def item_or_bad_row(where: str, parse: Callable[..., Item], content: Any, *more: Any) -> Item | BadRow:
    """What `parse` makes of the row's content, or the BadRow that stands in its place.

    content: one of `table_rows` may be the error that it could not be split for.
    """
    if isinstance(content, Exception):
        return bad_row(where, content)
    try:
        return parse(content, *more)
    except MALFORMED as error:
        return bad_row(where, error)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1, and lines; blank ones are left out. Of one that is too long comes what `decode` refuses."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.isspace():
            yield number, line


def _lines(path: Path) -> Iterator[bytes]:
    """All lines without a byte order mark; of a line that is too long, its first MAX_LINE_BYTES + 1 bytes."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        while line := file.readline(MAX_LINE_BYTES + 1):
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            yield line


def decode(line: bytes) -> str:
    """The line as text. Raises ValueError when it is too long or not UTF-8."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
    return line.decode()


def text_lines(path: Path) -> list[str]:
    """The lines of a small file of settings, stripped. Raises UserError when it is not there or not UTF-8."""
    try:
        return [decode(line).strip() for _, line in numbered_lines(required(path))]
    except ValueError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error})") from error


def table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The number of a row's first line, and its cells or why it cannot be split; empty rows are left out.

    Between commas, a cell in double quotes may hold commas and line ends (RFC 4180); other delimiters split wherever
    they stand. What is not UTF-8 becomes half surrogates, which `well_formed` refuses.
    """
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, error
            continue
        if cells:
            yield first, cells


def well_formed(text: str) -> str:
    """The text itself. Raises ValueError when it holds half a surrogate pair or a null character, as no path can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8 at character {error.start}") from error
    if "\0" in text:
        raise ValueError("a null character")
    return text


def field(entry: Any, name: str, kind: type[Kind]) -> Kind:
    """`entry[name]`. Raises ValueError when it is not there or not of that kind."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with {name!r}, found a {type(entry).__name__}")
    if name not in entry:
        raise ValueError(f"no {name!r}")
    value = entry[name]
    if not isinstance(value, kind):
        raise ValueError(f"{name} {value!r:.80} is not of type {kind.__name__}")
    if isinstance(value, str):
        well_formed(value)
    return value


def identifier(entry: Any, name: str) -> str:
    """`entry[name]`, a name or a number, as text. Raises ValueError when it is neither."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return str(value) if type(value) is int else field(entry, name, str)


def key_of(name: str) -> str:
    """A record's key made from a file's path or a corpus's own id. Raises ValueError when nothing is left of it."""
    if not (key := clean_key(well_formed(name))):
        raise ValueError(f"{name!r} is not a name")
    return key


def key_of_path(path: str) -> str:
    """A record's key made from a path: without the ending of the file's name."""
    return key_of(stem_of(path))


def stem_of(path: str) -> str:
    """The path without the ending of the file's name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def load_json(path: Path, *sections: str) -> dict[str, list[Any]]:
    """The lists of that name in the file's one object. Raises UserError when it has not the form."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); if it was downloaded, it came incomplete") from error
    for section in sections:
        if not isinstance(document, dict) or not isinstance(document.get(section), list):
            raise UserError(f"{path}: expected an object with the list {section!r}")
    return {section: document[section] for section in sections}


def stream_json(path: Path) -> Iterator[Any]:
    """The objects of the file's one list, of which only a part is in memory. Raises UserError when it is no list."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(CHUNK_CHARACTERS).lstrip()
        if not text.startswith("["):
            raise UserError(f"{path}: expected a list")
        place = 1
        while True:
            place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text.startswith("]", place):
                return
            try:
                element, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                text, place = text[place:], 0
                more = file.read(max(CHUNK_CHARACTERS, len(text))) if len(text) <= MAX_LINE_BYTES else ""
                if not more:
                    raise UserError(f"{path}: not JSON ({error}); if it was downloaded, it came incomplete") from error
                text += more
                continue
            yield element


def split_file(folder: Path, pattern: str, split: str) -> tuple[Path, str]:
    """The file `pattern.format(split)` and that split; train stands for train2014 where no other year is there.

    Raises UserError when there is none, or several years.
    """
    plain_name(split)
    expected = folder / pattern.format(split)
    if expected.is_file():
        return expected, split
    before, after = pattern.split("{}")
    files = (path.relative_to(folder).as_posix() for path in sorted(expected.parent.glob("*")))
    there = [name[len(before) : -len(after)] for name in files if name.startswith(before) and name.endswith(after)]
    years = [name for name in there if re.fullmatch(re.escape(split) + r"\d{4}", name)]
    if len(years) == 1:
        return folder / pattern.format(years[0]), years[0]
    choice = f"choose --split from {', '.join(there)}" if there else "it holds no file of that form"
    raise UserError(f"{folder}: no {pattern.format(split)}, so there is no split {split!r}; {choice}")


def split_folder(corpus: Path, split: str) -> Path:
    """The subfolder of the split; the whole corpus for train, where there is no such subfolder. UserError for none."""
    plain_name(split)
    if not corpus.is_dir():
        raise UserError(f"{corpus} is not a folder")
    if (corpus / split).is_dir():
        return corpus / split
    if split != "train":
        there = sorted(path.name for path in corpus.iterdir() if path.is_dir() and not path.name.startswith("."))
        raise UserError(f"{corpus}: no folder {split!r}, so there is no such split; there are {', '.join(there[:20])}")
    return corpus


def walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `top` down with the names of its files, sorted by stem, then name; hidden ones left out.

    Raises OSError for a folder that cannot be listed.
    """
    for folder, subfolders, names in os.walk(top, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        shown = (name for name in names if not name.startswith("."))
        yield Path(folder), sorted(shown, key=lambda name: (stem_of(name), name))


def _raise(error: OSError) -> None:
    raise error


def plain_name(split: str) -> None:
    """Raises UserError for a split that leads to another folder."""
    if not split or "/" in split or "\\" in split or split in (".", ".."):
        raise UserError(f"--split {split!r}: must be a name, such as train")


def join(folder: str, path: str) -> str:
    """The path seen from a folder, which may be a URL, or nothing."""
    return f"{folder.rstrip('/')}/{path}" if folder else path


def prefix(folder: Path, corpus: Path) -> str:
    """What the paths of the folder's files begin with, as seen from the corpus: "a/b/", or nothing."""
    place = folder.relative_to(corpus).as_posix()
    return "" if place == "." else f"{place}/"


def required(path: Path) -> Path:
    """The path. Raises UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file")
    return path
