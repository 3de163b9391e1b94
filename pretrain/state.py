"""Training states: what a run goes on from. Written in the background, complete or absent, the last few kept.

    checkpoints/step-00000200/    PyTorch's distributed checkpoint (DCP): any number of processes may load it
        .metadata                 what tensor lies where, by DCP
        files.json                written last: size and SHA-256 of every file. It exists: the state is complete

The state to go on from is the highest step whose listed files have their listed sizes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from opt.config import UserError, read_json
from opt.distributed import rank, world
from opt.files import sha256, sync_folder, write_atomic

FILES = "files.json"

# PyTorch remarks that a single process saves or loads, which is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class States:
    """The states in `folder`. One at a time is being written, while training goes on."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world() > 1 else None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = -1

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Copy the state and write it in the background, once the one before it is written; each step only once.

        Raises OSError of the one before it: a full disk, a folder that cannot be written.
        """
        if step == self._step:
            return
        self.join()
        self._step = step
        temporary = self.folder / f".step-{step:08d}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        writing = dcp.async_save(state(), checkpoint_id=temporary, process_group=self._group, no_dist=world() == 1)
        assert isinstance(writing, Future)
        self._writing = self._finisher.submit(self._finish, writing, step, temporary)

    def join(self) -> None:
        """Wait until what is being written is whole. Raises OSError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _finish(self, writing: Future[Any], step: int, temporary: Path) -> None:
        """In the background: list the files that all processes have written, give them their name, drop old states."""
        try:
            writing.result()
            if rank() == 0:
                _list_files(temporary)
                final = self.folder / f"step-{step:08d}"
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                sync_folder(self.folder)
                for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if (refused := _os_error(error)) is not None:
                raise refused from error
            raise


def newest_state(folder: Path) -> Path | None:
    """The highest step whose metadata exists and whose listed files have their listed sizes, or None."""
    return next((path for path in sorted(folder.glob("step-*"), reverse=True) if lacking(path) is None), None)


def lacking(path: Path) -> str | None:
    """What keeps a folder from being a whole state, in words, or None."""
    if not (path / ".metadata").exists() or not (path / FILES).exists():
        return "it was not finished"
    for name, listed in read_json(path / FILES).items():
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size != listed["bytes"]:
            return f"{name} has {size:,} of {listed['bytes']:,} bytes"
    return None


def load_state(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` (same structure as was saved) from a checkpoint, in place. Raises UserError when it is damaged."""
    for name, listed in read_json(path / FILES).items():
        if sha256(path / name) != listed["sha256"]:
            older = max((other for other in path.parent.glob("step-*") if other < path), default=None)
            raise UserError(
                f"{path} is damaged ({name} is not as it was written); delete that folder and run the same command "
                f"again to go on from {older.name if older else 'the beginning'}"
            )
    dcp.load(state, checkpoint_id=path, no_dist=world() == 1)


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left half written. Only while nobody writes there."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _list_files(folder: Path) -> None:
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_atomic(folder / FILES, json.dumps(listed, indent=1).encode())


def _os_error(error: BaseException | None) -> OSError | None:
    """What the file system said, where PyTorch's writer hides it behind errors of its own."""
    while error is not None and not isinstance(error, OSError):
        failures = list(error.failures.values()) if isinstance(error, dcp.CheckpointException) else []
        error = failures[0][0] if failures else error.__context__
    return error
