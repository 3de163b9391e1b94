"""Files from the web, read politely and within limits that a hostile server cannot pass.

    url --fetch--> bytes        in memory, at most max_bytes of them, their checksum tested where the server gives one

Only http and https, at most 5 redirects, a limit for every wait and for the whole of it; what Content-Length says is
not believed. An answer that may be better later (429, 5xx, a broken connection) is asked for again after waits that
double, with jitter; Retry-After holds for every thread that asks the same host. An answer that lasts (403, 404, 410)
is not asked for again. Which addresses may be asked: feature_extract/http_session.py.
"""

from __future__ import annotations

import base64
import hashlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import google_crc32c
import requests
import urllib3

from feature_extract.http_session import AddressRefused, session

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 16
TOO_BUSY = (408, 425, 429, 503)
"""What a server answers that wants to be asked later. Other 5xx are faults of its own that may pass, too."""

Answer = TypeVar("Answer")
_random = random.Random()


class FetchError(Exception):
    """The file could not be had: a fixed phrase, details in parentheses after it.

    lasting: asking again would get the same answer. retry_after: the seconds that the server asked to wait.
    """

    def __init__(self, reason: str, lasting: bool = False, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.lasting, self.retry_after = lasting, retry_after


class DamagedError(FetchError):
    """The bytes are not those that the server has."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, lasting=True)


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, in seconds, and how often a file is asked for."""

    connect: float = 10.0
    """For a connection."""
    read: float = 30.0
    """For the next bytes."""
    total: float = 300.0
    """For all bytes of one answer."""
    tries: int = 5
    """Requests for one file, all in all."""
    first_wait: float = 1.0
    """Before the second try; doubled before each further one. Between half of it and all of it, by chance."""
    longest_wait: float = 60.0
    """A server that asks for a longer one is given up."""


PATIENCE = Patience()


@dataclass(frozen=True)
class Fetched:
    """A file's content; checked: which checksum of the server's it has ("md5", "crc32c"; "": the server gave none)."""

    content: bytes
    checked: str


def fetch(url: str, max_bytes: int, patience: Patience = PATIENCE) -> bytes:
    """The content of an http(s) URL. Raises FetchError."""
    return fetch_checked(url, max_bytes, patience).content


def fetch_checked(url: str, max_bytes: int, patience: Patience = PATIENCE) -> Fetched:
    """As `fetch`; content with a wrong checksum is asked for once more. Raises FetchError, DamagedError."""

    def once() -> Fetched:
        with opened(url, patience) as response:
            content = b"".join(chunks(response, max_bytes, patience))
            return Fetched(content, check([content], given_sums(response.headers)))

    try:
        return tried(url, once, patience)
    except DamagedError:
        return tried(url, once, patience)


def size(url: str, patience: Patience = PATIENCE) -> int | None:
    """The bytes that the server says the file has; None when it does not say. Raises FetchError."""

    def once() -> int | None:
        with opened(url, patience, method="HEAD") as response:
            return _length(response.headers)

    return tried(url, once, patience)


def tried(url: str, once: Callable[[], Answer], patience: Patience) -> Answer:
    """What `once` gives, which asks the URL's host; called again while its FetchError may pass."""
    with _as_fetch_error():
        host = urlsplit(url).netloc
    for number in range(1, patience.tries + 1):
        _pauses.keep(host)
        try:
            return once()
        except FetchError as error:
            if error.lasting or number == patience.tries or (error.retry_after or 0) > patience.longest_wait:
                raise
            rest(host, number, error, patience)
    raise ValueError(f"patience of {patience.tries} tries")


def rest(host: str, number: int, error: FetchError, patience: Patience) -> None:
    """Wait after the `number`th failure in a row; for as long as the host has asked for, every thread waits."""
    if error.retry_after:
        _pauses.begin(host, error.retry_after)
    time.sleep(min(patience.longest_wait, patience.first_wait * 2 ** (number - 1)) * _random.uniform(0.5, 1.0))


@contextmanager
def opened(
    url: str, patience: Patience, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> Iterator[requests.Response]:
    """The answer to one request, redirects followed, its body not read yet. Raises FetchError."""
    with _as_fetch_error():
        response = _followed(method, url, dict(headers or {}), patience)
    with response:
        _refuse_status(response)
        yield response


def chunks(response: requests.Response, max_bytes: int | None, patience: Patience) -> Iterator[bytes]:
    """The answer's body as it comes. Raises FetchError when it is too large, too slow, or breaks off."""
    deadline, received = time.monotonic() + patience.total, 0
    while True:
        with _as_fetch_error():
            chunk = response.raw.read1(CHUNK_BYTES, decode_content=True)
        if not chunk:
            return
        received += len(chunk)
        if max_bytes is not None and received > max_bytes:
            raise FetchError(f"file too large (over {max_bytes:,} bytes)", lasting=True)
        if time.monotonic() > deadline:
            raise FetchError(f"server too slow (over {patience.total:g} s)")
        yield chunk


def given_sums(headers: Mapping[str, str]) -> dict[str, str]:
    """The checksums that a server gives of the whole file, in hexadecimal digits.

    Google's buckets say x-goog-hash, with an MD5 unless the object was put together from parts. An ETag of Amazon's
    is the MD5 of an object that was stored in one piece and not encrypted with a key of its own.
    """
    if headers.get("Content-Encoding", "identity") != "identity":
        return {}  # sums of the compressed bytes
    given = re.findall(r"(md5|crc32c)=([A-Za-z0-9+/]+=*)", headers.get("x-goog-hash", ""))
    sums = {kind: base64.b64decode(text).hex() for kind, text in given}
    etag = headers.get("ETag", "")
    from_amazon = "x-amz-request-id" in headers and headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
    if from_amazon and re.fullmatch('"[0-9a-f]{32}"', etag):
        sums["md5"] = etag.strip('"')
    return sums


def check(content: Iterable[bytes], sums: Mapping[str, str]) -> str:
    """Which of the given checksums the content was compared with, "" for none. Raises DamagedError."""
    if not sums:
        return ""
    kind = "md5" if "md5" in sums else "crc32c"
    digest: Any = hashlib.md5(usedforsecurity=False) if kind == "md5" else google_crc32c.Checksum()
    for chunk in content:
        digest.update(chunk)
    if digest.digest().hex() != sums[kind]:
        raise DamagedError(f"damaged on the way ({kind} differs)")
    return kind


def _followed(method: str, url: str, headers: dict[str, str], patience: Patience) -> requests.Response:
    """The first answer that is no redirect. requests itself would read a redirect's body, however long it is."""
    for _ in range(MAX_REDIRECTS + 1):
        if urlsplit(url).scheme.lower() not in ("http", "https"):
            raise FetchError("address refused (only http and https)", lasting=True)
        timeout = (patience.connect, patience.read)
        response = session().request(method, url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
        target = session().get_redirect_target(response)
        if target is None:
            return response
        response.close()
        url = urljoin(url, target)
    raise FetchError(f"too many redirects (over {MAX_REDIRECTS})", lasting=True)


def _refuse_status(response: requests.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (404, 410):
        raise FetchError(f"missing file (HTTP {status})", lasting=True)
    if status in (401, 403, 451):
        raise FetchError(f"access denied (HTTP {status})", lasting=True)
    if status in TOO_BUSY:
        raise FetchError(f"server busy (HTTP {status})", retry_after=_seconds(response.headers.get("Retry-After")))
    if status >= 500:
        raise FetchError(f"server error (HTTP {status})", retry_after=_seconds(response.headers.get("Retry-After")))
    raise FetchError(f"request refused (HTTP {status})", lasting=True)


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After asks for: a number of seconds or a date."""
    if retry_after is None or retry_after.isdigit():
        return float(retry_after) if retry_after else None
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return None


def _length(headers: Mapping[str, str]) -> int | None:
    """Content-Length, where it counts the bytes that we shall see."""
    text = headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and headers.get("Content-Encoding", "identity") == "identity" else None


@contextmanager
def _as_fetch_error() -> Iterator[None]:
    try:
        yield
    except AddressRefused as error:
        raise FetchError(f"address refused ({error})", lasting=True) from error
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise FetchError("server too slow (no answer in time)") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError) as error:
        raise FetchError("address refused (not a URL)", lasting=True) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _connection_error(error) from error


def _connection_error(error: BaseException) -> FetchError:
    """What lies under an error of requests: it wraps those of urllib3, which wrap those of the system."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FetchError("no secure connection (certificate not valid)", lasting=True)
        if isinstance(cause, socket.gaierror):
            lasting = cause.errno == socket.EAI_NONAME
            return FetchError("unknown host" if lasting else "server not reached (name look-up failed)", lasting)
        if isinstance(cause, OSError) and cause.strerror:
            return FetchError(f"server not reached ({cause.strerror})")
        cause = cause.__cause__ or cause.__context__
    return FetchError("connection broken")


class _Pauses:
    """Until when a host wants to be left alone, for all threads."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, host: str, seconds: float) -> None:
        with self._lock:
            self._until[host] = max(self._until.get(host, 0.0), time.monotonic() + seconds)

    def keep(self, host: str) -> None:
        while True:
            with self._lock:
                left = self._until.get(host, 0.0) - time.monotonic()
                if left <= 0:
                    self._until.pop(host, None)
                    return
            time.sleep(left)


_pauses = _Pauses()
