"""Reading from the web: what is asked again, what is not, and what no server can make us do."""

import base64
import gzip
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import bucket
import google_crc32c
import pytest

from feature_extract.fetch import DamagedError, FetchError, Patience, check, fetch, fetch_checked, given_sums, size
from feature_extract.http_session import AddressRefused, judge

QUICK = Patience(connect=1, read=0.3, total=1, tries=3, first_wait=0.01, longest_wait=2)


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("OPT_FETCH_HOSTS", "localhost, 127.0.0.1")
    with bucket.serving() as server:
        server.files["/a.jpg"] = bytes(range(256)) * 1000
        yield server


def reason(url: str, max_bytes: int = 1_000_000, patience: Patience = QUICK) -> str:
    with pytest.raises(FetchError) as error:
        fetch(url, max_bytes, patience)
    return str(error.value)


@pytest.mark.parametrize("sums", ["md5", "etag", ""])
def test_a_file_comes_whole_and_checked(web, sums):
    web.sums = sums
    got = fetch_checked(f"{web.url}/a.jpg", 1_000_000, QUICK)
    assert got.content == web.files["/a.jpg"] and got.checked == ("md5" if sums else "")
    assert size(f"{web.url}/a.jpg", QUICK) == 256_000
    assert web.asked == ["GET /a.jpg", "HEAD /a.jpg"]
    (agent,) = web.agents
    assert agent.startswith("opt-omni/")


def test_crc32c_is_used_when_there_is_no_md5():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C's definition
    given = {"x-goog-hash": "crc32c=" + base64.b64encode((0xE3069283).to_bytes(4, "big")).decode()}
    assert check([b"12345", b"6789"], given_sums(given)) == "crc32c"
    with pytest.raises(DamagedError, match=r"damaged on the way \(crc32c differs\)"):
        check([b"12345", b"6780"], given_sums(given))


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"0123456789abcdef0123456789abcdef"'},  # not Amazon's
        {"ETag": '"0123456789abcdef0123456789abcdef-2"', "x-amz-request-id": "1"},  # stored in two parts
        {"ETag": '"0123456789abcdef0123456789abcdef"', "x-amz-request-id": "1",
         "x-amz-server-side-encryption": "aws:kms"},
        {"x-goog-hash": "md5=AAAAAAAAAAAAAAAAAAAAAA==", "Content-Encoding": "gzip"},
    ],
)
def test_headers_that_are_no_checksum_of_the_file(headers):
    assert given_sums(headers) == {}


@pytest.mark.parametrize("code", [404, 410, 403, 401, 400])
def test_an_answer_that_lasts_is_taken_once(web, code):
    web.faults["/a.jpg"] = [bucket.status(code)] * 2
    assert f"(HTTP {code})" in reason(f"{web.url}/a.jpg")
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "fault", [bucket.status(503), bucket.status(500), bucket.status(429), bucket.cut(), bucket.silent(0.5)]
)
def test_an_answer_that_may_pass_is_asked_for_again(web, fault):
    web.faults["/a.jpg"] = [fault, fault]
    assert fetch(f"{web.url}/a.jpg", 1_000_000, QUICK) == web.files["/a.jpg"]
    assert len(web.asked) == 3


@pytest.mark.parametrize(
    ("fault", "phrase"),
    [
        (bucket.status(503), "server busy (HTTP 503)"),
        (bucket.status(502), "server error (HTTP 502)"),
        (bucket.cut(), "connection broken"),
        (bucket.silent(0.5), "server too slow (no answer in time)"),
        (bucket.dripping, "server too slow (over 1 s)"),
    ],
)
def test_it_is_given_up_with_a_reason_that_stays_the_same(web, fault, phrase):
    web.faults["/a.jpg"] = [fault] * 3
    assert reason(f"{web.url}/a.jpg") == phrase
    assert len(web.asked) == 3


def test_waits_double(web, monkeypatch):
    waits = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr("feature_extract.fetch.time", clock)  # not the server's
    web.faults["/a.jpg"] = [bucket.status(500)] * 5
    reason(f"{web.url}/a.jpg", patience=Patience(tries=5, first_wait=1, longest_wait=4, read=1))
    assert len(waits) == 4
    for wait, most in zip(waits, [1, 2, 4, 4], strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(web, date):
    asked = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if date else "1"
    web.faults["/a.jpg"] = [bucket.status(429, Retry_After=asked)]
    began = time.monotonic()
    assert fetch(f"{web.url}/a.jpg", 1_000_000, QUICK) and 0.9 < time.monotonic() - began < 3


def test_a_wait_beyond_our_patience_is_not_waited(web):
    web.faults["/a.jpg"] = [bucket.status(429, Retry_After="3600")]
    assert reason(f"{web.url}/a.jpg") == "server busy (HTTP 429)"
    assert len(web.asked) == 1


def test_a_wrong_checksum_is_fetched_once_more(web):
    web.faults["/a.jpg"] = [bucket.flipped]
    assert fetch(f"{web.url}/a.jpg", 1_000_000, QUICK) == web.files["/a.jpg"]
    web.faults["/a.jpg"] = [bucket.flipped, bucket.flipped]
    assert reason(f"{web.url}/a.jpg") == "damaged on the way (md5 differs)"
    assert len(web.asked) == 4


def test_size_is_limited_while_reading(web):
    assert reason(f"{web.url}/a.jpg", 255_999) == "file too large (over 255,999 bytes)"
    web.faults["/a.jpg"] = [bucket.endless]
    tracemalloc.start()
    assert reason(f"{web.url}/a.jpg", 1_000_000) == "file too large (over 1,000,000 bytes)"
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_a_compressed_bomb_is_stopped(web):
    bomb = gzip.compress(bytes(50_000_000))
    web.faults["/a.jpg"] = [lambda handler, _: handler.answer(200, bomb, {"Content-Encoding": "gzip"})]
    tracemalloc.start()
    assert reason(f"{web.url}/a.jpg", 1_000_000) == "file too large (over 1,000,000 bytes)"
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_redirects_are_followed_and_limited(web):
    web.faults["/moved"] = [bucket.status(302, Location="/a.jpg")]
    assert fetch(f"{web.url}/moved", 1_000_000, QUICK) == web.files["/a.jpg"]
    web.faults["/loop"] = [bucket.status(301, Location="/loop")] * 9
    assert reason(f"{web.url}/loop") == "too many redirects (over 5)"
    web.faults["/file"] = [bucket.status(302, Location="file:///etc/passwd")]
    assert reason(f"{web.url}/file") == "address refused (only http and https)"
    web.faults["/meta"] = [bucket.status(302, Location="http://169.254.169.254/latest/meta-data/")]
    assert reason(f"{web.url}/meta") == "address refused (link-local, where cloud metadata is)"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a.jpg", "/etc/passwd", "", "http://"])
def test_only_http_urls(url):
    assert reason(url).startswith("address refused (")


@pytest.mark.parametrize("url", ["http://[::1/a", "http://a b/c", "http://\ud800.example/", "http://" + 80 * "a" + "/"])
def test_what_is_no_url(url):
    assert reason(url) == "address refused (not a URL)"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_asked_only_when_the_user_says_so(web, monkeypatch, host):
    url = web.url.replace("127.0.0.1", host) + "/a.jpg"
    assert fetch(url, 1_000_000, QUICK)
    monkeypatch.setenv("OPT_FETCH_HOSTS", "files.lan")
    asked = len(web.asked)
    with ThreadPoolExecutor(1) as pool:  # another thread: a connection that is open was judged when it was made
        refused = pool.submit(reason, url).result()
    assert refused == "address refused (not public; OPT_FETCH_HOSTS names the hosts that may be)"
    assert len(web.asked) == asked, "refused before anything was sent"


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254", "10.0.0.1", "192.168.1.1", "100.100.100.200",
     "127.0.0.1", "::1", "fd00:ec2::254", "0.0.0.0", "::ffff:10.0.0.1"],
)
def test_addresses_that_a_corpus_may_not_name(address, monkeypatch):
    with pytest.raises(AddressRefused):
        judge("any.example", address)
    monkeypatch.setenv("OPT_FETCH_HOSTS", "any.example")
    if "169.254" in address or address.startswith("fe80"):
        with pytest.raises(AddressRefused):
            judge("any.example", address)
    else:
        judge("any.example", address)


def test_public_addresses():
    judge("dns.google", "8.8.8.8")
    judge("dns.google", "2001:4860:4860::8888")


def test_a_host_that_is_not_there(monkeypatch):
    monkeypatch.setenv("OPT_FETCH_HOSTS", "127.0.0.1")
    assert reason("http://127.0.0.1:9/") == "server not reached (Connection refused)"
