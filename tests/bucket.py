"""A web server of this process that has files as a public bucket has them, and faults to order."""

import base64
import hashlib
import http.server
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Fault = Callable[["_Handler", bytes], None]


@dataclass
class Bucket:
    """`files` and `faults` by path ("/a/b.jpg"); a GET uses up one fault. `asked` lists "METHOD PATH [RANGE]"."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    ranges: bool = True
    sums: str = "md5"
    url: str = ""

    def headers(self, content: bytes) -> dict[str, str]:
        digest = hashlib.md5(content)
        given = {"ETag": f'"{digest.hexdigest()}"'}
        if self.sums == "md5":
            given["x-goog-hash"] = f"crc32c=AAAAAA==, md5={base64.b64encode(digest.digest()).decode()}"
        if self.sums == "etag":
            given["x-amz-request-id"] = "1"
        return given


class _Server(http.server.ThreadingHTTPServer):
    bucket: Bucket
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        bucket, path = self.server.bucket, self.path
        asked_range = self.headers.get("Range", "")
        bucket.asked.append(f"{self.command} {path} {asked_range}".strip())
        bucket.agents.add(self.headers.get("User-Agent", ""))
        if self.command == "GET" and bucket.faults[path]:
            bucket.faults[path].pop(0)(self, bucket.files.get(path, b""))
        elif path not in bucket.files:
            self.answer(404, b"not here")
        else:
            self.serve(bucket.files[path], asked_range)

    def serve(self, content: bytes, asked_range: str) -> None:
        headers = self.server.bucket.headers(content)
        begun = re.fullmatch(r"bytes=(\d+)-", asked_range)
        if begun and self.server.bucket.ranges and self.headers.get("If-Range") == headers["ETag"]:
            first = int(begun[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[first:], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def status(code: int, **headers: str) -> Fault:
    """Answers with this status; headers as `Retry_After="1"`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.answer(code, b"no", named)


def cut(share: float = 0.5) -> Fault:
    """Promises the whole file and breaks off after a share of it."""

    def fault(handler: _Handler, content: bytes) -> None:
        handler.send_response(200)
        for name, value in handler.server.bucket.headers(content).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: int(share * len(content))])
        handler.close_connection = True

    return fault


def flipped(handler: _Handler, content: bytes) -> None:
    """Sends one wrong byte, with the headers of the right ones."""
    handler.answer(200, bytes([content[0] ^ 255]) + content[1:], handler.server.bucket.headers(content))


def silent(seconds: float) -> Fault:
    """Accepts the request and says nothing."""
    return lambda handler, content: time.sleep(seconds)


def late(seconds: float) -> Fault:
    """Answers as it should, but later."""

    def fault(handler: _Handler, content: bytes) -> None:
        time.sleep(seconds)
        handler.serve(content, handler.headers.get("Range", ""))

    return fault


def dripping(handler: _Handler, content: bytes) -> None:
    """Sends a byte every 20 ms."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for byte in content:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.02)


def endless(handler: _Handler, content: bytes) -> None:
    """Sends more than any limit; says that it will be ten bytes, by no header at all."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(bytes(65536))
    except OSError:
        pass
    handler.close_connection = True


@contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket on a port of this machine; its `url` has no slash at the end."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        server.bucket = Bucket(url=f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server.bucket
        server.shutdown()
