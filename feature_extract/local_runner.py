"""Work items to receipts on this machine: in this process, or in several that each hold the networks.

A work item is one shard: rows of the source, in order. It is done when its receipt is there, and never in part; what
it writes depends on nothing but its rows and the extractors, so who does it, and when, does not matter.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feature_extract.assemble import Media, make_record, read_media
from feature_extract.extractors import Extractors, reopen
from feature_extract.sources.item import BadRow, Item
from opt.config import UserError
from opt.data.record import RecordError
from opt.data.shards import ShardWriter

Row = Item | BadRow
READ_AHEAD = 8
"""Rows whose files are read while the networks are busy with an earlier one."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkItem:
    """One shard to be: its name and its rows."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Setup:
    """What a worker needs besides its work items; `extractors` as `Extractors.describe` gives them."""

    out: Path
    extractors: dict[str, dict[str, Any]]
    device: str
    jpeg: bool


class Stopped(Exception):
    """The job was asked to stop: the shard in hand is given up."""


def extract_shard(work: WorkItem, extractors: Extractors, out: Path, jpeg: bool, on_row: Callable[[], None]) -> None:
    """Write one shard and its receipt, or nothing. `on_row` is called after each row and may raise to stop."""
    max_seconds = extractors.audio.settings.max_seconds if extractors.audio is not None else None

    def read(row: Row) -> Media | BadRow:
        return row if isinstance(row, BadRow) else read_media(row, jpeg, max_seconds)

    with one_thread(), ShardWriter(out, work.name) as shard:
        for media in _ahead(read, work.rows):
            if isinstance(media, BadRow):
                shard.fail(media.key, f"row: {media.reason}")
            else:
                record, failures = make_record(media, extractors)
                for failure in failures:
                    shard.fail(failure.key, failure.reason)
                if record is not None:
                    try:
                        shard.write(record)
                    except RecordError as error:
                        shard.fail(record.key, f"record: breaks the contract ({error})")
            on_row()


def run(
    work: Sequence[WorkItem], setup: Setup, extractors: Extractors, workers: int, on_rows: Callable[[int], None]
) -> None:
    """Do all work items. `on_rows(count)` hears of rows done. Raises KeyboardInterrupt after SIGINT or SIGTERM."""
    with _interruptible():
        if workers <= 1 or len(work) <= 1:
            for item in work:
                extract_shard(item, extractors, setup.out, setup.jpeg, lambda: on_rows(1))
        else:
            _run_in_processes(work, setup, min(workers, len(work)), on_rows)


def _run_in_processes(work: Sequence[WorkItem], setup: Setup, workers: int, on_rows: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")
    rows, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (setup, rows, stop))
    seen = 0
    try:
        with _sigint_ignored():  # by the processes that this starts: a Ctrl-C is this process's to handle
            pending: set[Future[None]] = {pool.submit(_work, item) for item in work}
        while pending:
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            now = rows.value
            on_rows(now - seen)
            seen = now
            for future in done:
                future.result()
        on_rows(rows.value - seen)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended unexpectedly, most often because memory ran out: run the same command again to go "
            f"on, with fewer than --workers {workers} if it happens again"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: tuple[Setup, Any, Any]
"""What a worker process is born with: setup, counter of rows, request to stop."""


def _begin_worker(setup: Setup, rows: Any, stop: Any) -> None:
    """Remember what work items need, and end with the parent, however that ends."""
    global _worker
    _worker = (setup, rows, stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.cache
def _networks() -> Extractors:
    """Loaded once a process, at its first work item: an error then travels to the parent as any other."""
    torch.set_num_threads(1)
    return reopen(_worker[0].extractors, _worker[0].device)


def _work(item: WorkItem) -> None:
    setup, rows, stop = _worker

    def on_row() -> None:
        with rows.get_lock():
            rows.value += 1
        if stop.is_set():
            raise Stopped

    extract_shard(item, _networks(), setup.out, setup.jpeg, on_row)


def _ahead(read: Callable[[Row], Media | BadRow], rows: Sequence[Row]) -> Iterator[Media | BadRow]:
    """`read` of every row in order, a few ahead of the consumer, in a thread: decoders release the interpreter."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Media | BadRow]] = deque()
        try:
            for row in rows:
                waiting.append(thread.submit(read, row))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: features depend in their last bits on the number, and workers share the cores anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as Ctrl-C: both raise KeyboardInterrupt, and every `with` block leaves the folder in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
