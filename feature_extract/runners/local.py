"""Workers as processes of this machine, each with its own networks, on one thread."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from tempfile import gettempdir
from typing import Any

import torch

from feature_extract.extractors import Extractors, reopen
from feature_extract.profiles import Weight, weigh
from feature_extract.runners.supervise import Event
from feature_extract.work import Setup, WorkItem, extract_shard
from opt.config import UserError

PRELOADED = [
    "feature_extract.work", "feature_extract.backends.torchvision_detector", "feature_extract.tiny.regions",
    "feature_extract.backends.transformers_speech", "feature_extract.tiny.audio", "feature_extract.tiny.codes",
]  # fmt: skip
"""Imported once, by the process that workers are forked from."""


class LocalWorker:
    """A process and the two ends of what is said between us."""

    def __init__(self, setup: Setup, number: int) -> None:
        self.process, self.ours = begin(work_until_killed, setup, number)

    def give(self, work: WorkItem) -> None:
        """Let it begin."""
        with suppress(ConnectionError):  # it has ended: `ended` says so
            self.ours.send(work)

    def hear(self) -> list[Event]:
        """What it has said since the last call."""
        events: list[Event] = []
        try:
            while self.ours.poll():
                events.append(self.ours.recv())
        except (EOFError, ConnectionError):  # it has ended: `ended` says so
            pass
        return events

    def ended(self) -> str:
        """How it ended without being asked to; empty while it lives."""
        code = self.process.exitcode
        if code is None:
            return ""
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.join()
        self.ours.close()


def work_until_killed(setup: Setup, number: int, ours: Connection) -> None:
    """The life of worker `number`: networks, then one work item after the other, until the parent ends it or ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    device = device_of(number, setup.device, torch.cuda.device_count())
    networks = functools.cache(lambda: reopen(setup.extractors, device))
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            do(ours.recv(), networks, setup, lambda event: ours.send(event))


def begin(target: Callable[..., None], *given: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs `target(*given, connection)`, and our end of the connection.

    Raises UserError when the system does not let one begin.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*given, theirs), daemon=True)
    try:
        with signals_ignored():  # by what workers are forked from, and so by them: they are for this one to handle
            forkserver.ensure_running()
        process.start()  # waits for PRELOADED the first time, with an ear for signals
    except OSError as error:  # of the socket in TMPDIR, or of a limit on processes or open files
        raise UserError(f"--workers: a process could not be started ({error}); is TMPDIR, {gettempdir()}, a "
                        "short path with room, and are `ulimit -n` and `-u` large enough?") from error
    theirs.close()
    return process, ours


def weigh_apart(setup: Setup, seconds: float) -> Weight | None:
    """`weigh` in a process of its own, which a file may end or hold up; None when it has."""
    process, ours = begin(_weigh, setup)
    try:
        found = ours.recv() if ours.poll(seconds) else None
    except (EOFError, ConnectionError):
        found = None
    process.kill()
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _weigh(setup: Setup, ours: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        ours.send(weigh(setup, reopen(setup.extractors, device_of(0, setup.device, torch.cuda.device_count()))))
    except UserError as error:
        ours.send(error)


def device_of(number: int, device: str, gpus: int) -> str:
    """Where worker `number` runs: workers go round the GPUs when all of them may be used."""
    return f"cuda:{number % gpus}" if device == "cuda" and gpus else device


def do(work: WorkItem, networks: Callable[[], Extractors], setup: Setup, say: Callable[[Event], None]) -> None:
    """One work item, and what is said of it. networks: opens the extractors, or gives those that are open."""
    try:
        extractors = networks()
        say(Event("ready"))
        extract_shard(work, extractors, setup, lambda row, failures: say(Event("row", row, tuple(failures))))
        say(Event("shard"))
    except (UserError, OSError) as error:  # an OSError is of writing: what cannot be read is a failure of its row
        say(Event("error", error=error))
    except Exception as error:  # a mistake of ours: the traceback is all that helps
        say(Event("error", error=RuntimeError("".join(traceback.format_exception(error)))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """SIGINT and SIGTERM ignored, as processes begun in this block go on doing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
