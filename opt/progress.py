"""How far a long verb has come: a live bar on a terminal, one plain line about every ten seconds elsewhere.

    with progress("extract", total=len(items), unit="images") as bar:
        for item in items:
            ...
            bar.advance(note="2 failed")

Progress goes to standard error, so that standard output holds only what the verb answers.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts steps towards `total` (None: unknown) and shows rate, time left and a note. Made by `progress`."""

    def __init__(self, label: str, total: int | None, done: int, unit: str) -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.note = ""
        self._begun_with = done
        self._ended = False
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (  # the bar gives way first where the terminal is narrow
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(self.label))),
                BarColumn(24),
                TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            )
            self._bar = RichProgress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, status=self.status())
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more are done; `note` replaces the text at the end of the line."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self.status())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def status(self) -> str:
        """For example `120/2000 images, 34.0/s, 0:55 left, 2 failed`."""
        seconds = time.monotonic() - self._began
        rate = (self.done - self._begun_with) / seconds if seconds > 0 else 0.0
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{count} {self.unit}".strip()]
        if rate > 0:
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if self._ended:
            parts.append(f"took {_clock(seconds)}")
        elif rate > 0 and self.total is not None:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if self._bar is not None:
            self._bar.update(self._task, status=self.status())
            self._bar.stop()
        else:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self.label}: {self.status()}", file=sys.stderr, flush=True)


def progress(label: str, total: int | None = None, done: int = 0, unit: str = "") -> Progress:
    """A progress display for a `with` block. `done` were finished by an earlier run: counted, but not in the rate."""
    return Progress(label, total, done, unit)


def in_bytes(size: float) -> str:
    """Bytes as people say them: `913 bytes`, `3.9 MB`, `1,204.0 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} bytes"


def counted(count: int, what: str) -> str:
    """`1 shard`, `1,204 shards`."""
    plural = "es" if what.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {what}{plural if count != 1 else ''}"


def _clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
