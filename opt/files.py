"""Files that are complete or absent: written under a temporary name, fsynced, renamed.

A kill at any moment leaves the old file, the new file, or no file, and at worst a forgotten `.NAME.*.tmp` beside it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def open_atomic(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` for writing; it appears under its name only when the block ends without an error.

    `mode` is "wb", "w+b" or "w" (UTF-8). The parent folder must exist. After an error in the block the old file,
    if there was one, stands as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.filename == str(temporary) or _is_full(error)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the caller knows
        raise
    sync_folder(path.parent)


def _is_full(error: OSError) -> bool:
    """No room to write: the error names no file, for it is about an open one."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, content: bytes) -> None:
    """Write the whole file at once, as `open_atomic` does."""
    with open_atomic(path, "wb") as file:
        file.write(content)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, before the work whose results go there. Raises OSError where none can be put."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def replace_folder(new: Path, final: Path) -> None:
    """Give a folder that is written whole its name; the one that had it goes. `mend_folder` mends a kill in between."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def mend_folder(final: Path) -> None:
    """After a kill in `replace_folder`: the older folder has its name again where the new one has not got it."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, after a rename that put one there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
