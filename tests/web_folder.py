"""A folder on the web that answers requests for ranges, and fails to order."""

from __future__ import annotations

import http.server
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

Fault = Callable[["_Handler", bytes], None]


@dataclass
class Web:
    """A folder on the web. `asked` lists "NAME RANGE", `said` who asked; a request takes the next of `faults`, None for
    none. `over`: it is shut down."""

    url: str
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    faults: deque[Fault | None] = field(default_factory=deque)
    ranges: bool = True
    over: threading.Event = field(default_factory=threading.Event)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    folder: Path
    web: Web


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        web, (folder, _, name) = self.server.web, self.path.rpartition("/")
        web.asked.append(f"{name} {self.headers.get('Range', '')}".strip())
        web.said.append(self.headers.get("Authorization", ""))
        path = self.server.folder / name
        if folder != "/data/shards" or not path.exists():
            return self.answer(404, b"not here")
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        ranged = asked is not None and web.ranges
        if asked is not None and web.ranges:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        fault = web.faults.popleft() if web.faults else None
        return fault(self, content) if fault else self.answer(206 if ranged else 200, content)

    def answer(self, status: int, content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


def busy(handler: _Handler, content: bytes) -> None:
    handler.answer(503, b"busy")


def cut(handler: _Handler, content: bytes) -> None:
    """Breaks off half way through what it promised."""
    handler.answer(206, content[: len(content) // 2], len(content))
    handler.close_connection = True


def short(handler: _Handler, content: bytes) -> None:
    """Half of it, as if that were all."""
    handler.answer(206, content[: len(content) // 2])


def flipped(handler: _Handler, content: bytes) -> None:
    """All of it, the last byte wrong."""
    handler.answer(206, content[:-1] + bytes([content[-1] ^ 1]))


def hung(handler: _Handler, content: bytes) -> None:
    """Nothing, for ever."""
    handler.server.web.over.wait()
    handler.close_connection = True


def stalled(handler: _Handler, content: bytes) -> None:
    """Half of what it promised, and then nothing, for ever."""
    handler.answer(206, content[: len(content) // 2], len(content))
    hung(handler, content)


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """The folder on a port of this machine."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up
        server.folder = folder
        server.web = Web(f"http://127.0.0.1:{server.server_address[1]}/data/shards")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.web
        server.web.over.set()
        server.shutdown()
