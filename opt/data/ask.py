"""Bytes asked of any fsspec file system, all at once and for a limited time.

    file_system(url) --> system, path
    answers(system, [(path, start, end), ...], seconds) --> the bytes of each, or what went wrong
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any

from opt.config import UserError


def refuse_secrets(url: str) -> None:
    """Raises UserError, without the secret, for an address that may hold one: runs write addresses down."""
    found = "a query or fragment (? or #)" if "?" in url or "#" in url else ""
    for part in url.split("::"):
        protocol, _, rest = part.partition("://")
        authority = re.sub(r"^\[.*\]", "", rest.partition("/")[0])  # without the colons of IPv6
        no_port = re.search(r":(?!\d*$)", authority)
        if no_port or "@" in authority and protocol.lower() in ("http", "https"):
            found = "a user name or password"
    if found:
        raise UserError(f"the address of shards ({url.partition('://')[0]}://...) holds {found}, which the run's files "
                        "and messages would repeat: leave it out, and give it by the place's own variables or files "
                        "(AWS_* for s3://) or by fsspec's (FSSPEC_HTTP for https://), as docs/shards.md shows")


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, this process's own (fsspec keeps one a process), and the path on it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0].partition("::")[0]
        extra = {"https": "http", "gcs": "gs", "s3a": "s3"}.get(protocol, protocol)
        raise UserError(f"{url}: {error}: `pip install 'fsspec[{extra}]'` brings what it takes") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; it must be a URL that fsspec knows, such as s3://bucket/folder") from error


def answers(
    system: Any, wanted: Sequence[tuple[str, int | None, int | None]], seconds: float
) -> list[bytes | BaseException]:
    """What comes of each (path, start, end) within `seconds`, TimeoutError where nothing does.

    Other threads ask, and this one only waits, without catching anything: what a signal handler raises ends the wait.
    """
    from fsspec.asyn import AsyncFileSystem

    futures: list[Future[bytes]] = []
    try:
        for path, start, end in wanted:
            if isinstance(system, AsyncFileSystem):
                task = system._cat_file(path, start=start, end=end)
                futures.append(asyncio.run_coroutine_threadsafe(task, system.loop))
            else:
                futures.append(Future())
                _queue(os.getpid()).put((futures[-1], functools.partial(system.cat_file, path, start, end)))
        done, _ = wait(futures, seconds)
        late = TimeoutError(f"no answer in {seconds:.3g} seconds")
        return [late if f not in done or f.cancelled() else f.exception() or f.result() for f in futures]
    finally:
        for future in futures:
            future.cancel()


@functools.cache
def _queue(process: int) -> SimpleQueue[Any]:
    """Of this process: what its one thread reads from file systems that know no asyncio, as (future, read)."""
    queue: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_in_turn, args=(queue,), name="shards", daemon=True).start()
    return queue


def _read_in_turn(queue: SimpleQueue[Any]) -> None:
    """Never ends. Skips what nobody waits for any more."""
    while True:
        future, read = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)
        del future, read  # or the last bytes would stay
