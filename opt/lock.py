"""One job a folder: whoever writes into a folder of results holds its lock, alone or together with its like.

The system releases a lock however the process that holds it ends.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opt.config import UserError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other jobs out of the folder, and remove what a killed one, or a killed worker, left unfinished in it.

    Raises UserError when another job holds it.
    """
    with _locked(folder, fcntl.LOCK_EX):
        remove_unfinished(folder)
        try:
            yield
        finally:
            remove_unfinished(folder)


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """Keep jobs out that want the folder alone; parts of one job, each holding this, let each other in.

    Raises UserError when a job has the folder alone.
    """
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove files and folders that killed jobs left under temporary names. Only while nobody else writes."""
    for forgotten in folder.glob(".*.tmp"):
        if forgotten.is_dir():
            shutil.rmtree(forgotten, ignore_errors=True)
        else:
            forgotten.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another job is writing here; wait for it, or choose another --out") from error
        yield
