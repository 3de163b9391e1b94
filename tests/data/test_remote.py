"""Shards behind a URL: the same samples as on a disk, within the cache's bound, whatever network and disk do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
from stored_records import full_narration, full_picture, full_record, noise_jpeg, same, write_folder
from web_folder import Fault, Web, busy, cut, flipped, hung, serving, short, stalled

from opt.config import UserError
from opt.data import remote
from opt.data.ask import answers, refuse_secrets
from opt.data.loader import Loader
from opt.data.plan import BatchPlan, Plan, Tasks
from opt.data.record import Record, Sample
from opt.data.remote import Cache, Span
from opt.data.shards import ShardReader
from opt.data.stored import DamagedRecord
from opt.data.subset import Subset

RECORDS, IN_A_SHARD = 24, 6
GIGABYTE = 1e9
ME = "Basic bWU6U0VDUkVU"
"""What me:SECRET is in a request."""


def wide_record(number: int) -> Record:
    """140 kB: two windows of the merging of near requests."""
    rng = np.random.default_rng(number)
    picture = full_picture(rng, 36, noise_jpeg(number), width=1024)
    return Record(f"key{number}", (picture,), (full_narration(rng, 0, 4000), full_narration(rng, 1)))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Four shards of six records of two narrations each, 0.85 MB a shard."""
    records = [wide_record(number) for number in range(RECORDS)]
    shards = [records[start : start + IN_A_SHARD] for start in range(0, RECORDS, IN_A_SHARD)]
    return write_folder(tmp_path_factory.mktemp("shards"), shards)


@pytest.fixture
def web(local: ShardReader) -> Iterator[Web]:
    with serving(local.folder) as web:
        yield web


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01))


@pytest.fixture
def in_memory(local: ShardReader) -> Iterator[str]:
    """The folder in fsspec's memory, whose files change as a test likes."""
    system = fsspec.filesystem("memory")
    for path in local.folder.iterdir():
        system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    system.rm("/shards", recursive=True)


def allocated(folder: Path) -> int:
    """Bytes that the files below take on the disk."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def agree(reader: ShardReader, local: ShardReader, numbers: range | list[int]) -> bool:
    return all(same(reader.sample(n, jpeg=True), local.sample(n, jpeg=True)) for n in numbers)


def shuffled(reader: ShardReader, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(len(reader)).tolist()


@pytest.mark.parametrize("protocol", ["memory", "http", "file"])
def test_a_url_reads_as_the_folder_does(
    protocol: str, local: ShardReader, web: Web, in_memory: str, tmp_path: Path
) -> None:
    url = {"memory": in_memory, "http": web.url + "/", "file": f"file://{local.folder}"}[protocol]
    reader = ShardReader(url, Cache(tmp_path, 1))
    assert (len(reader), reader.sizes, reader.fingerprint) == (len(local), (len(local),), local.fingerprint)
    assert reader.manifest == local.manifest and reader.place == url
    assert same(reader.lengths, local.lengths) and np.array_equal(reader.key_hash, local.key_hash)
    assert list(reader.captions()) == list(local.captions()) and list(reader.keys()) == list(local.keys())
    assert agree(reader, local, shuffled(local))
    assert same(reader.record(3, jpeg=True), local.record(3, jpeg=True))
    again = pickle.loads(pickle.dumps(reader))
    assert agree(again, local, [5, 0, 47])


def test_what_the_cache_holds_is_not_asked_for_again(local: ShardReader, web: Web, tmp_path: Path) -> None:
    for attempt in range(2):
        reader = ShardReader(web.url, Cache(tmp_path, 1))
        assert agree(reader, local, range(len(local))) and len(list(reader.captions())) == len(local)
        assert len(web.asked) > 20 if attempt == 0 else web.asked == ["manifest.json"]
        web.asked.clear()


def test_a_batch_comes_by_one_round_of_requests(local: ShardReader, web: Web, tmp_path: Path) -> None:
    reader = Subset(ShardReader(web.url, Cache(tmp_path, 1)), np.arange(1, len(local)))
    reader.prefetch([])
    numbers = [1, 2, 3, 17, 40, 41]  # samples 2 to 4, 18, 41 and 42 of the whole: records 1, 2, 9, 20, 21
    reader.prefetch(numbers, jpeg=True)
    spans = [request for request in web.asked if ".tar" in request]
    assert len(spans) == 3  # what lies side by side comes as one
    assert agree(reader, Subset(local, reader.numbers), numbers)
    assert [request for request in web.asked if ".tar" in request] == spans
    reader.prefetch(numbers, jpeg=True)
    assert [request for request in web.asked if ".tar" in request] == spans


def test_records_whose_header_is_there_are_fetched_with_the_rest(
    local: ShardReader, web: Web, tmp_path: Path
) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 1))
    assert list(reader.keys()) == list(local.keys())
    reader.prefetch(range(len(local)), jpeg=True)
    web.asked.clear()
    assert agree(reader, local, shuffled(local)) and not web.asked


def test_spans_near_each_other_are_one() -> None:
    far = 200 + remote.NEAR
    spans = [Span("b", 0, 5), Span("a", far + 1, far + 9), Span("a", 0, 200), Span("a", 10, 20), Span("a", 150, 180)]
    assert remote._joined(spans) == [Span("a", 0, 200), Span("a", far + 1, far + 9), Span("b", 0, 5)]
    assert remote._joined([Span("a", far, far + 1), Span("a", 0, 200)]) == [Span("a", 0, far + 1)]


def test_captions_come_by_few_bytes_and_rounds(
    local: ShardReader, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []
    ask = remote.RemoteFolder._ask
    monkeypatch.setattr(remote.RemoteFolder, "_ask", lambda self, spans: rounds.append(spans) or ask(self, spans))
    assert list(ShardReader(web.url, Cache(tmp_path, 1)).captions()) == list(local.captions())
    assert len(rounds) <= 1 + 2 * len(local.manifest.shards)
    tars = sum(receipt.bytes for receipt in local.manifest.shards)
    assert sum(s.end - s.start for spans in rounds for s in spans if ".tar" in s.name) < tars / 5


def test_the_bound_is_kept_and_the_shard_used_longest_ago_goes(local: ShardReader, web: Web, tmp_path: Path) -> None:
    bound = 2_000_000
    reader = ShardReader(web.url, Cache(tmp_path, bound / GIGABYTE))
    folder = tmp_path / reader.fingerprint[:32]
    most = 0
    for number in [*range(len(local)), *shuffled(local)]:
        assert agree(reader, local, [number])
        most = max(most, allocated(tmp_path))
    assert 1_200_000 < most <= bound
    for path in folder.glob("*.tar"):
        os.truncate(path, 0)
    shards = [range(first, first + 12) for first in range(0, 48, 12)]
    for shard in shards[:2]:
        reader.prefetch(shard, jpeg=True)
    time.sleep(0.02)  # file times are no finer than some milliseconds
    reader.prefetch([0])
    reader.prefetch(shards[2], jpeg=True)
    assert [(folder / f"{number:05d}.tar").stat().st_blocks > 0 for number in range(3)] == [True, False, True]
    assert agree(reader, local, shards[1])


def test_files_emptied_or_spoilt_under_a_reader_are_fetched_again(
    local: ShardReader, web: Web, tmp_path: Path
) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 1))
    assert agree(reader, local, range(len(local)))
    folder = tmp_path / reader.fingerprint[:32]
    for spoil in (lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 100_000),
                  lambda path: path.write_bytes(b"x" * 500_000)):
        for path in folder.glob("*.tar"):
            spoil(path)
        assert list(reader.keys()) == list(local.keys())
        assert agree(reader, local, range(len(local)))
    shutil.rmtree(tmp_path)
    assert agree(reader, local, [0, 30, 0, 47]) and list(reader.keys()) == list(local.keys())
    again = ShardReader(web.url, Cache(tmp_path, 1))
    assert np.array_equal(again.key_hash, local.key_hash)
    for path in folder.glob("*.npy"):
        path.write_bytes(b"x" * 100)
    again = ShardReader(web.url, Cache(tmp_path, 1))
    assert np.array_equal(again.key_hash, local.key_hash) and agree(again, local, [40])


class Sums:
    """A preparer that adds up what it is given."""

    jpeg = True

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> list[tuple[str, float]]:
        parts = [(samples[number].key, samples[number].pictures[0]) for number in plan.sample.tolist()]
        return [(key, float(picture.regions.sum()) + len(picture.jpeg)) for key, picture in parts]


def test_training_gets_the_same_batches_through_a_small_cache(local: ShardReader, web: Web, tmp_path: Path) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 0.002))
    answers = []
    for source, workers in ((local, 0), (reader, 2)):
        costs = 1 + source.lengths.regions
        plan = Plan(0, costs, 300, Tasks(("all",), (1.0,)), source.key_hash, multiple=2, sizes=source.sizes)
        answers.append(list(islice(Loader(source, plan, Sums(), workers=workers), 10)))
    assert answers[0] == answers[1]


def read_all(url: str, cache: Cache, folder: Path, seed: int, batch: int) -> None:
    reader, local = ShardReader(url, cache), ShardReader(folder)
    order = shuffled(local, seed)
    for start in range(0, len(order), batch):
        reader.prefetch(order[start : start + batch], jpeg=True)
        if not agree(reader, local, order[start : start + batch]):
            os._exit(1)


def test_processes_share_a_cache_that_is_too_small(local: ShardReader, web: Web, tmp_path: Path) -> None:
    bound = 1_800_000
    cache = Cache(tmp_path, bound / GIGABYTE)
    ShardReader(web.url, cache).sample(0)  # connections of before the fork
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=read_all, args=(web.url, cache, local.folder, seed, 6)) for seed in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert 0 < allocated(tmp_path) <= bound


@pytest.mark.parametrize("fault", [busy, cut, short, flipped])
def test_a_server_that_fails_now_and_then_is_asked_again(
    local: ShardReader, web: Web, tmp_path: Path, fault: Fault
) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 1))
    reader.key_hash  # noqa: B018  # the indices; what is wrong in one of them is said at once
    web.faults = deque([None, fault, None, None, fault, fault, None] * 20)
    for start in range(0, len(local), 4):
        numbers = list(range(start, start + 4))
        reader.prefetch(numbers)
        if fault is not flipped:
            assert agree(reader, local, numbers)
    if fault is flipped:  # found by its checksum, and fetched again
        web.faults.clear()
        assert agree(reader, local, range(len(local)))


def test_a_server_that_stays_away_is_named(local: ShardReader, web: Web, tmp_path: Path) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 1))
    web.faults = deque([busy] * 100)
    with pytest.raises(UserError, match=rf"{web.url}/00000.*503.*4 attempts.*run the same command again"):
        reader.sample(0)
    web.faults.clear()
    assert agree(reader, local, [0])
    with pytest.raises(UserError, match=rf"{web.url}/nowhere/manifest.json does not exist.*opt extract"):
        ShardReader(web.url + "/nowhere", Cache(tmp_path, 1))
    web.ranges = False
    with pytest.raises(UserError, match="must answer requests for ranges"):
        reader.sample(40)


@pytest.mark.parametrize("fault", [hung, stalled])
def test_a_server_that_never_answers_is_asked_again_in_time(
    local: ShardReader, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    reader = ShardReader(web.url, Cache(tmp_path, 1))
    reader.key_hash  # noqa: B018  # the indices
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    web.faults = deque([fault, None, fault])
    web.asked.clear()
    reader.prefetch([0, 17, 40, 41])
    assert len(web.asked) == 5, "what came in time is kept: of three spans two hung, and were asked for again"
    assert agree(reader, local, [0, 17, 40, 41])
    web.faults = deque([fault] * 100)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"{web.url}/00001.tar: no answer in .*4 attempts in .*the same command again"):
        reader.sample(20)
    assert 4 * 0.3 < time.monotonic() - began < 5
    web.faults.clear()
    assert agree(reader, local, [20])


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set, files of fsspec's memory take for ever to be read."""
    stuck, over = threading.Event(), threading.Event()
    system = type(fsspec.filesystem("memory"))
    read = system.cat_file
    monkeypatch.setattr(system, "cat_file", lambda *asked: over.wait() if stuck.is_set() else read(*asked))
    yield stuck
    stuck.clear()
    over.set()


def test_file_systems_without_asyncio_are_waited_for_no_longer_and_hold_one_thread(
    local: ShardReader, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: threading.Event
) -> None:
    reader = ShardReader(in_memory, Cache(tmp_path, 1))
    reader.sample(0)
    threads = threading.active_count()
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    stuck.set()
    began = time.monotonic()
    for number in (20, 40):
        with pytest.raises(UserError, match=r"memory://shards/0000..npy: no answer in 0.1\d* seconds \(4 attempts"):
            reader.sample(number)
    assert time.monotonic() - began < 3 and threading.active_count() == threads


def test_what_nobody_waits_for_any_more_is_not_read() -> None:
    asked, over = [], threading.Event()

    class Slow:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            asked.append(path)
            over.wait()
            return path.encode()

    assert [type(answer) for answer in answers(Slow(), [("a", 0, 1), ("b", 0, 1)], 0.1)] == [TimeoutError] * 2
    over.set()
    assert answers(Slow(), [("c", 0, 1)], 10) == [b"c"] and asked == ["a", "c"]


class Stop(Exception):
    """What a signal handler raises."""


@contextmanager
def stopped_after(seconds: float, error: type[BaseException] = Stop) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        with pytest.raises(error):
            yield
        assert seconds <= time.monotonic() - began < seconds + 0.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_ends_the_wait(
    local: ShardReader, web: Web, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stuck: threading.Event,
) -> None:  # fmt: skip
    on_the_web, slow = ShardReader(web.url, Cache(tmp_path / "web", 1)), ShardReader(in_memory, Cache(tmp_path, 1))
    costs = 1 + on_the_web.lengths.regions
    plan = Plan(0, costs, 300, Tasks(("all",), (1.0,)), on_the_web.key_hash, multiple=2, sizes=on_the_web.sizes)
    web.faults = deque([hung] * 3)
    with stopped_after(0.2):
        on_the_web.sample(0)
    with stopped_after(0.2, KeyboardInterrupt):
        next(iter(Loader(on_the_web, plan, Sums(), workers=0)))
    web.faults = deque([busy] * 3)
    monkeypatch.setattr(remote, "PAUSES", (30.0,))
    with stopped_after(0.2):
        on_the_web.sample(0)
    stuck.set()
    with stopped_after(0.2):
        slow.sample(0)
    web.faults.clear()
    assert agree(on_the_web, local, [0, 20])


def test_a_place_that_refuses_is_said_plainly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError) as refused:
        ShardReader(f"http://127.0.0.1:{port}/x", Cache(tmp_path, 1))
    assert "Connect call failed" in str(refused.value)
    assert "ssl" not in str(refused.value) and "replaced" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:SECRET@host/shards", "https://SECRET@host/shards", "HTTP://me:SEC/RET@host/shards",
        "https://host:80/shards?token=SECRET", "s3://bucket/shards#SECRET", "s3://key:SECRET@bucket/shards",
        "simplecache::https://me:SECRET@host/shards", "sftp://me:1SECRET@host:22/shards", "https://me:SEC#RET@host/x",
    ],
)  # fmt: skip
def test_addresses_with_secrets_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    for open_it in (lambda: ShardReader(url, Cache(tmp_path, 1)), lambda: ShardReader(url)):
        with pytest.raises(UserError, match="docs/shards.md") as refused:
            open_it()
        assert not any(part in str(refused.value) for part in ("SEC", "RET", "host", "me:"))


@pytest.mark.parametrize(
    "url",
    ["https://host:8000/a@b/c:d", "abfs://container@account.dfs.core.windows.net/x", "sftp://me@host:22/x",
     "s3://bucket/x", "https://[2001:db8:0:0:0:0:0:1]:80/x", "hf://datasets/me/shards@main/x", "file:///x"],
)  # fmt: skip
def test_addresses_without_secrets_are_not_refused(url: str) -> None:
    refuse_secrets(url)


@pytest.mark.parametrize("way", ["headers", "netrc"])
def test_a_web_server_is_told_a_secret_by_fsspecs_configuration(
    local: ShardReader, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    ways = {"netrc": {"client_kwargs": {"trust_env": True}}, "headers": {"headers": {"Authorization": ME}}}
    monkeypatch.setitem(fsspec.config.conf, "http", ways[way])
    if way == "netrc":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password SECRET\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    reader = ShardReader(web.url, Cache(tmp_path / "cache", 1))
    assert agree(reader, local, [0, 20]) and set(web.said) == {ME}


def test_data_that_changed_is_never_mixed(local: ShardReader, in_memory: str, tmp_path: Path) -> None:
    before = ShardReader(in_memory, Cache(tmp_path / "cache", 1))
    before.prefetch([0, 1], jpeg=True)
    other = write_folder(tmp_path / "other", [[full_record(f"new{n}", n) for n in range(4)]] * 4)
    system = fsspec.filesystem("memory")
    for path in other.folder.iterdir():
        system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    after = ShardReader(in_memory, Cache(tmp_path / "cache", 1))
    assert agree(after, other, range(len(other))) and agree(before, local, [0, 1])
    with pytest.raises(UserError, match="memory://shards/00001.npy is not the index|00001.npy.*came of"):
        before.sample(20)
    assert pickle.loads(pickle.dumps(before)).fingerprint == local.fingerprint


def test_damage_at_the_source_names_it_and_the_key(local: ShardReader, in_memory: str, tmp_path: Path) -> None:
    content = bytearray((local.folder / "00000.tar").read_bytes())
    row = np.load(local.folder / "00000.npy")[2]
    content[int(row["offset"]) + 100_000] ^= 1
    fsspec.filesystem("memory").pipe_file("/shards/00000.tar", bytes(content))
    reader = ShardReader(in_memory, Cache(tmp_path, 1))
    with pytest.raises(DamagedRecord, match="memory://shards/00000.tar.*'key1'.*replaced or damaged") as damaged:
        reader.sample(2)
    assert str(pickle.loads(pickle.dumps(damaged.value))) == str(damaged.value)
    assert agree(reader, local, [0, 1, 4, 5])
    index = bytearray((local.folder / "00003.npy").read_bytes())
    index[-1] ^= 1
    fsspec.filesystem("memory").pipe_file("/shards/00003.npy", bytes(index))
    with pytest.raises(UserError, match="memory://shards/00003.npy is not the index"):
        reader.lengths  # noqa: B018


def test_a_full_disk_and_wrong_settings_are_sentences(
    local: ShardReader, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(in_memory, Cache(tmp_path, 1))

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched, pytest.raises(UserError, match="cannot be written.*No space left"):
        patched.setattr(os, "pwrite", full)
        reader.sample(0)
    assert agree(reader, local, [0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ShardReader(in_memory, Cache(tmp_path / "file", 1))
    with pytest.raises(UserError, match="more than 0"):
        Cache(tmp_path, 0)
    with pytest.raises(UserError, match="its index alone takes"):
        ShardReader(in_memory, Cache(tmp_path, 1e-6))
    with pytest.raises(UserError, match="through a local cache"):
        ShardReader(in_memory)
    with pytest.raises(UserError, match=r"pip install 'fsspec\[smb\]'"):
        ShardReader("smb://host/share", Cache(tmp_path, 1))
    with pytest.raises(UserError, match="URL that fsspec knows"):
        ShardReader("nothing://host/share", Cache(tmp_path, 1))
    with pytest.raises(UserError, match="address of a remote folder"):
        ShardReader(Path("s3://bucket/shards"))
