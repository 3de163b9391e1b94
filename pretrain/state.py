"""Training states: what a run goes on from. Written in the background, complete or absent, the last few kept.

    checkpoints/step-00000200/    PyTorch's distributed checkpoint (DCP): any number of processes may load it
        .metadata                 what tensor lies where, by DCP
        files.json                written last: size and SHA-256 of every file. It exists: the state is complete

The state to go on from is the highest step whose listed files have their listed sizes.
"""

from __future__ import annotations

import json
import re
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
        self.step = -1
        """The step of the state that was saved last, or that the run went on from."""

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Copy the state and write it in the background, once the one before it is written; each step only once.

        Raises OSError of the one before it: a full disk, a folder that cannot be written.
        """
        if step == self.step:
            return
        self.join()
        self.step = step
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
                whole = [path for path in _states(self.folder) if path <= final and lacking(path) is None]
                for old in whole[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if (refused := _os_error(error)) is not None:
                raise OSError(refused.errno, refused.strerror, str(self.folder)) from error
            raise


def newest_state(folder: Path) -> Path | None:
    """The highest step whose metadata exists and whose listed files have their listed sizes, or None."""
    return next((path for path in reversed(_states(folder)) if lacking(path) is None), None)


def lacking(path: Path) -> str | None:
    """What keeps a folder from being a whole state, in words, or None."""
    try:
        sizes = {name: int(about["bytes"]) for name, about in read_json(path / FILES).items()}
        for name, size in {".metadata": sizes[".metadata"], **sizes}.items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found:,} of {size:,} bytes"
    except (OSError, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{FILES} or a file that it lists is missing or damaged ({error})"
    return None


def _states(folder: Path) -> list[Path]:
    """Folders of states, whole or not, by step."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


def load_state(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` (same structure as was saved) from a checkpoint, in place. Raises UserError when it is damaged."""
    reason = None
    try:
        listed = read_json(path / FILES)
        reason = next((f"{name} is not as it was written" for name in listed
                       if sha256(path / name) != listed[name]["sha256"]), None)
        if reason is None:
            dcp.load(state, checkpoint_id=path, no_dist=world() == 1)
    except (dcp.CheckpointException, ValueError, KeyError, OSError) as error:  # of other sizes, or gone meanwhile
        reason = f"it does not fit this model, or is gone: {str(error).strip().splitlines()[-1][:200]}"
    if reason is not None:
        older = max((other for other in _states(path.parent) if other < path), default=None)
        raise UserError(
            f"{path} is damaged ({reason}); delete that folder and run the same command again to go on from "
            f"{older.name if older else 'the beginning'}"
        )


def _list_files(folder: Path) -> None:
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_atomic(folder / FILES, json.dumps(listed, indent=1).encode())


def _os_error(error: BaseException | None) -> OSError | None:
    """What the file system said, where PyTorch's writer hides it behind errors of its own."""
    while error is not None and not isinstance(error, OSError):
        failures = list(error.failures.values()) if isinstance(error, dcp.CheckpointException) else []
        error = failures[0][0] if failures else error.__context__
    return error
