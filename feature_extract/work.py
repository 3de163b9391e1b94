"""A work item to a receipt: what one worker does, whichever runner gave it the work.

    rows of the plan --read ahead--> media --extractors--> records --> shard, index, receipt

A work item is one shard: consecutive rows of the plan. It is done when its receipt is there, and never in part; what it
writes depends on nothing but its rows and the extractors, so who does it, and when, does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from feature_extract.assemble import Media, make_record, read_media
from feature_extract.extractors import Extractors
from feature_extract.plan import Plan, Row
from feature_extract.sources.item import BadRow
from opt.data.manifest import Failure, read_receipt
from opt.data.record import Record, RecordError, check
from opt.data.shards import ShardWriter, StoredShard

READ_AHEAD = 16
"""Rows whose files are read while the networks are busy with an earlier one."""
READERS = 2
READ_AHEAD_BYTES = 256_000_000
"""No further row is read while those that wait hold more than this."""


@dataclass(frozen=True)
class WorkItem:
    """One shard to be: rows start..stop-1 of the plan.

    given_up: rows that are not to be touched, and why. careful: read nothing ahead, so that a row that ends the process
    is known. retry: keep the records of the shard that is there, and do only the rows that failed.
    """

    name: str
    start: int
    stop: int
    given_up: dict[int, str] = field(default_factory=dict)
    careful: bool = False
    retry: bool = False


@dataclass(frozen=True)
class Setup:
    """What a worker needs besides its work items. root: where the paths of the plan begin.

    extractors: as `Extractors.describe` gives them.
    """

    out: Path
    plan: Plan
    root: Path
    extractors: dict[str, dict[str, Any]]
    device: str
    jpeg: bool
    int8: bool


def extract_shard(
    work: WorkItem, extractors: Extractors, setup: Setup, on_row: Callable[[int, list[Failure]], None]
) -> None:
    """Write one shard and its receipt, or nothing.

    `on_row(row, failures)` is called after each row with what was lost of it, and may raise to stop.
    """
    rows = dict(zip(range(work.start, work.stop), setup.plan.rows(work.start, work.stop), strict=True))
    with ExitStack() as stack:
        stored, kept = _good_records(work, setup.out, stack)
        shard = stack.enter_context(ShardWriter(setup.out, work.name, int8=setup.int8))
        stack.enter_context(one_thread())
        fresh = [row for place, row in rows.items() if place not in work.given_up and row.item.key not in kept]
        media = ahead(lambda row: read_row(row, setup, extractors), fresh, 0 if work.careful else READ_AHEAD)
        for place, row in rows.items():
            key = row.item.key
            failures = [Failure(key, f"row: {reason}") for reason in row.losses]
            if place in work.given_up:
                failures.append(Failure(key, f"row: {work.given_up[place]}"))
            elif key in kept:
                shard.copy(stored, kept[key])
            else:
                failures += _write(next(media), shard, extractors)
            for failure in failures:
                shard.fail(failure.key, failure.reason)
            on_row(place, failures)


def _good_records(work: WorkItem, out: Path, stack: ExitStack) -> tuple[Any, dict[str, int]]:
    """For a retry, the shard as it is, open, and where in it the records lie of which nothing was lost."""
    receipt = read_receipt(out, work.name) if work.retry else None
    if receipt is None:
        return None, {}
    stored = stack.enter_context(StoredShard(out, receipt))
    failed = {failure.key for failure in receipt.failures}
    return stored, {key: place for place, key in enumerate(stored.keys) if key not in failed}


def _write(media: Media | BadRow, shard: ShardWriter, extractors: Extractors) -> list[Failure]:
    """Write the row's record, if it comes to one; answer what was lost of it."""
    record, failures = extract_row(media, extractors)
    if record is not None:
        try:
            shard.write(record)
        except RecordError as error:
            failures = [*failures, Failure(record.key, f"record: breaks the contract ({error})")]
    return failures


def read_row(row: Row, setup: Setup, extractors: Extractors) -> Media | BadRow:
    """A row's files, those that the extractors want."""
    if isinstance(row.item, BadRow):
        return row.item
    max_seconds = extractors.audio.settings.max_seconds if extractors.audio is not None else None
    return read_media(row.item, setup.root, setup.jpeg, max_seconds)


def extract_row(media: Media | BadRow, extractors: Extractors) -> tuple[Record | None, list[Failure]]:
    """A row's record, which keeps the contract, or None; and what was lost of it."""
    if isinstance(media, BadRow):
        return None, [Failure(media.key, f"row: {media.reason}")]
    record, failures = make_record(media, extractors)
    try:
        return (check(record) if record is not None else None), failures
    except RecordError as error:
        return None, [*failures, Failure(media.item.key, f"record: breaks the contract ({error})")]


def ahead(read: Callable[[Row], Media | BadRow], rows: Sequence[Row], most: int) -> Iterator[Media | BadRow]:
    """`read` of every row in order, at most `most` ahead of the consumer, in threads: decoders release the interpreter.

    What waits holds at most READ_AHEAD_BYTES and READERS rows more.
    """
    threads = ThreadPoolExecutor(READERS)
    waiting: deque[Future[Media | BadRow]] = deque()
    remaining = iter(rows)
    try:
        while True:
            while len(waiting) <= most and _has_room(waiting):
                row = next(remaining, None)
                if row is None:
                    break
                waiting.append(threads.submit(read, row))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _has_room(waiting: deque[Future[Media | BadRow]]) -> bool:
    """Whether a reader is free, and what waits holds no more than it may. What a row holds is known when it is read."""
    done = [future.result() for future in waiting if future.done()]
    held = sum(media.size for media in done if isinstance(media, Media))
    return len(waiting) - len(done) < READERS and held <= READ_AHEAD_BYTES


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: features depend in their last bits on the number, and workers share the cores anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
