"""The work items of a job given to workers, and what the workers say heard, until all receipts are there.

    work items --give--> Worker --hear--> Event: a row is done, a shard is done, an error of the user's

A row that takes too long, or that ends its worker twice, is given up: its worker is replaced, its shard begun again
without it, and it stands among the failures. Nothing else is ever lost: a shard is there as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from feature_extract.work import WorkItem
from opt.config import RunAgain, UserError
from opt.data.manifest import Failure, by_reason
from opt.progress import Progress

POLL_SECONDS = 0.1
CRASHES = 2
"""How often a worker may end at the same row before the row is given up."""


class Event(NamedTuple):
    """What a worker says: "ready", "row" (it is done, and what was lost of it), "shard", or "error"."""

    kind: str
    row: int = -1
    failures: tuple[Failure, ...] = ()
    error: Exception | None = None


class Worker(Protocol):
    """A process with networks of its own that does one work item at a time."""

    def give(self, work: WorkItem) -> None:
        """Let it begin."""

    def hear(self) -> list[Event]:
        """What it has said since the last call; does not wait."""

    def ended(self) -> str:
        """How it ended without being asked to; empty while it lives."""

    def kill(self) -> None:
        """End it now."""


@dataclass(frozen=True)
class Limits:
    """row_seconds: a row that takes longer is given up. max_failures: more of them stop the job; None: no limit."""

    row_seconds: float
    max_failures: int | None


@dataclass
class Tally:
    """What is lost so far, over all shards that are done or in hand: how many of each kind, and the first of it."""

    kinds: Counter[str] = field(default_factory=Counter)
    first: dict[str, Failure] = field(default_factory=dict)

    def add(self, failures: Sequence[Failure]) -> None:
        """Count failures."""
        self.kinds += by_reason(failures)
        for failure in failures:
            self.first.setdefault(failure.kind, failure)

    def note(self) -> str:
        """For example `12 failed: 10 picture: missing file, 2 caption: empty`."""
        most = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(2))
        more = ", ..." if len(self.kinds) > 2 else ""
        return f"{self.kinds.total()} failed: {most}{more}" if self.kinds else ""

    def table(self) -> list[str]:
        """A line a kind, the most frequent first, with the key of one."""
        return [f"  {count:>6}  {kind}, such as {self.first[kind].key}" for kind, count in self.kinds.most_common()]

    def check(self, limits: Limits) -> None:
        """Raises UserError beyond the limit."""
        if limits.max_failures is not None and self.kinds.total() > limits.max_failures:
            listed = "\n".join(self.table())
            raise UserError(
                f"stopped: more failures than --max-failures {limits.max_failures}\n{listed}\nMend them and run the "
                "same command with --retry-failed, or go on with a larger --max-failures"
            )


@dataclass
class _Post:
    """A worker at its work item; `row` is the one in hand, since `since` (infinity: all rows are done)."""

    number: int
    worker: Worker
    work: WorkItem | None = None
    row: int = -1
    since: float = 0.0
    done: int = 0
    failures: list[Failure] = field(default_factory=list)


class Supervisor:
    """Gives work to `count` workers, made by `hire(number)`, and watches them. One use: `run`."""

    def __init__(self, hire: Callable[[int], Worker], count: int, limits: Limits, tally: Tally, bar: Progress) -> None:
        self.hire, self.count, self.limits, self.tally, self.bar = hire, count, limits, tally, bar
        self.crashes: Counter[int] = Counter()
        """Row -> how often a worker ended at it."""

    def run(self, todo: Sequence[WorkItem]) -> None:
        """Do all work items. Raises RunAgain when asked to stop before, UserError for an error of the user's."""
        self.todo = deque(todo)
        self.posts: list[_Post] = []
        try:
            for number in range(min(self.count, len(todo))):
                self.posts.append(_Post(number, self.hire(number)))
            with stop_requests() as stop:
                while self._working(stop.is_set()):
                    for post in self.posts:
                        self._attend(post, stop.is_set())
                    time.sleep(POLL_SECONDS)
            if self.todo:
                raise RunAgain(f"stopped as asked; {len(self.todo)} shards are left")
        finally:
            for post in self.posts:
                post.worker.kill()

    def _working(self, stopping: bool) -> bool:
        return any(post.work is not None for post in self.posts) or (bool(self.todo) and not stopping)

    def _attend(self, post: _Post, stopping: bool) -> None:
        """Hear the worker, replace it where it hangs or has ended, and give it work where it has none."""
        for event in post.worker.hear():
            self._heard(post, event)
        ended = post.worker.ended()
        if post.work is not None and post.since and time.monotonic() - post.since > self.limits.row_seconds:
            post.worker.kill()
            self._again(post, f"took longer than {self.limits.row_seconds:g} s")
        elif ended and post.work is not None:
            self._crashed(post, ended)
        elif ended:
            post.worker = self.hire(post.number)
        if post.work is None and self.todo and not stopping:
            post.work = self.todo.popleft()
            post.worker.give(post.work)

    def _heard(self, post: _Post, event: Event) -> None:
        """Follow what the worker does."""
        now = time.monotonic()
        if event.error is not None:
            raise event.error
        assert post.work is not None
        if event.kind == "ready":  # the networks are open: from here on the clock of a row runs
            post.row, post.since = post.work.start, now
        elif event.kind == "row":
            post.row = event.row + 1
            post.since = now if post.row < post.work.stop else math.inf  # writing the shard is no row's fault
            post.done += 1
            post.failures += event.failures
            self.tally.add(event.failures)
            self.bar.advance(1, self.tally.note())
            self.tally.check(self.limits)
        elif event.kind == "shard":
            post.work, post.row, post.since, post.done, post.failures = None, -1, 0.0, 0, []

    def _crashed(self, post: _Post, how: str) -> None:
        """A worker has ended: once may be chance or want of memory, twice at one row is the row."""
        if not post.since and self.crashes[post.row] >= CRASHES:
            raise UserError(f"a worker could not begin ({how}); run the same command again, with fewer --workers if "
                            "memory ran out")
        assert post.work is not None
        self.crashes[post.row] += 1
        if post.row >= post.work.stop and self.crashes[post.row] > CRASHES:
            raise UserError(f"workers end while they write shard {post.work.name} ({how}); is there memory and room?")
        if post.since and post.work.careful and post.row < post.work.stop and self.crashes[post.row] >= CRASHES:
            self._again(post, f"ended its worker process ({how})")
        else:
            self._again(post, "")

    def _again(self, post: _Post, reason: str) -> None:
        """A new worker, and the shard in hand from its beginning: without the row when there is a `reason`."""
        assert post.work is not None
        given_up = {**post.work.given_up, post.row: reason} if reason else post.work.given_up
        self.todo.appendleft(dataclasses.replace(post.work, given_up=given_up, careful=True))
        self.bar.advance(-post.done)
        self.tally.kinds -= by_reason(post.failures)
        post.worker.kill()
        post.worker, post.work, post.row = self.hire(post.number), None, -1
        post.since, post.done, post.failures = 0.0, 0, []


class _Asked(BaseException):
    """SIGTERM has come. Unlike RunAgain, no `except Exception` on the way takes it for its own."""


@contextmanager
def stop_at_once() -> Iterator[None]:
    """SIGTERM raises RunAgain out of the block: for what comes before the work and after it, with no shard in hand."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Asked

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Asked as asked:
        raise RunAgain("stopped as asked, with no shard in hand") from asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: finish what is in hand. A second SIGTERM is as Ctrl-C, which stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
