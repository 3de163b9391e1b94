"""A large file read from the web as it comes, and kept: what an earlier run has got is not fetched again.

    NAME         the whole file, its checksum tested
    NAME.part    its first bytes, as far as anybody has read
    NAME.version what the server said of the file when its first bytes came: {"validator", "bytes", "sums"}

A reader that stops after the first thousand lines has fetched little more than those. The next one begins with the
bytes that are there and goes on where they end (HTTP Range), if the server still has the same file (If-Range).
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import requests

from feature_extract.fetch import (
    CHUNK_BYTES,
    DamagedError,
    FetchError,
    Patience,
    check,
    chunks,
    given_sums,
    opened,
    rest,
)
from opt.config import UserError, from_dict, read_json
from opt.files import sync_folder, write_atomic


@dataclass(frozen=True)
class Version:
    """Which file it is. validator: a strong ETag or a date; bytes: None when not said; sums: see `given_sums`."""

    validator: str
    bytes: int | None
    sums: dict[str, str]


def stream(url: str, path: Path, patience: Patience) -> Generator[bytes, None, None]:
    """The bytes of the file at `url` in order, kept at `path`. The reader may stop anywhere.

    Raises FetchError; DamagedError when what has been read is not, or no longer, the server's file: nothing of it is
    kept then, and the reader begins anew.
    """
    if path.exists():
        yield from _blocks(path)
        return
    part = path.with_name(f"{path.name}.part")
    version = _known(path)
    if version is None:  # nothing says which file the bytes belong to
        part.unlink(missing_ok=True)
    with _appending(part) as file:
        yield from _blocks(part)
        failures = 0
        while version is None or version.bytes is None or file.tell() < version.bytes:
            try:
                with opened(url, patience, _range(file.tell(), version)) as response:
                    version = _same(response, version, path)
                    for chunk in _from(file.tell(), response, patience):
                        file.write(chunk)
                        failures = 0
                        yield chunk
                break
            except DamagedError:
                forget(path)
                raise
            except FetchError as error:
                failures += 1
                if error.lasting or failures == patience.tries or (error.retry_after or 0) > patience.longest_wait:
                    raise
                rest(urlsplit(url).netloc, failures, error, patience)
    _complete(part, path, version)


def forget(path: Path) -> None:
    """Remove whatever is there of a file that `stream` keeps."""
    for name in (path.name, f"{path.name}.part", f"{path.name}.version"):
        path.with_name(name).unlink(missing_ok=True)


def _known(path: Path) -> Version | None:
    try:
        return from_dict(Version, read_json(path.with_name(f"{path.name}.version")))
    except (FileNotFoundError, UserError):
        return None


def _range(offset: int, version: Version | None) -> dict[str, str]:
    if version is None or not version.validator or not offset:
        return {}
    return {"Range": f"bytes={offset}-", "If-Range": version.validator}


def _same(response: requests.Response, version: Version | None, path: Path) -> Version:
    """The file's version, noted when this is the first answer. Raises DamagedError when it is another one by now."""
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    if version is None:
        length = response.headers.get("Content-Length", "")
        version = Version(validator, int(length) if length.isdecimal() else None, given_sums(response.headers))
        if validator:
            write_atomic(path.with_name(f"{path.name}.version"), json.dumps(asdict(version)).encode())
    elif not validator or validator != version.validator:
        raise DamagedError("file changed on the server while it was read")
    return version


def _from(offset: int, response: requests.Response, patience: Patience) -> Iterator[bytes]:
    """The answer's bytes from `offset` of the file on; a server that knows no Range sends those before as well."""
    said = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not said.startswith(f"bytes {offset}-"):
        raise FetchError(f"connection broken (asked for bytes from {offset} on, came {said!r})")
    skip = offset if response.status_code == 200 else 0
    for chunk in chunks(response, None, patience):
        kept = chunk[min(skip, len(chunk)) :]
        skip -= len(chunk) - len(kept)
        if kept:
            yield kept


def _complete(part: Path, path: Path, version: Version | None) -> None:
    try:
        check(_blocks(part), version.sums if version else {})
    except DamagedError:
        forget(path)
        raise
    os.replace(part, path)
    path.with_name(f"{path.name}.version").unlink(missing_ok=True)
    sync_folder(path.parent)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            yield block


@contextmanager
def _appending(part: Path) -> Iterator[IO[bytes]]:
    """The file open at its end; however the block ends, what was written stays."""
    with part.open("ab") as file:
        try:
            yield file
        finally:
            file.flush()
            os.fsync(file.fileno())
