"""One job a folder: whoever writes into a folder of results holds its lock."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opt.config import UserError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other jobs out of the folder, and remove what a killed one left unfinished in it.

    Raises UserError when another job holds it. The system releases the lock however this process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another job is writing here; wait for it, or choose another --out") from error
        for forgotten in folder.glob(".*.tmp"):
            if forgotten.is_file():
                forgotten.unlink(missing_ok=True)
        yield
