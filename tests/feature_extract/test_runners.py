"""Runners: whoever does the work and however it is cut off, the shards are the same; what hangs or dies is given up."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import evil_worker
import numpy as np
import pytest
from jobs import config, contents

from feature_extract import job
from feature_extract.job import extract
from feature_extract.runners import local
from feature_extract.runners.static import Share, share
from feature_extract.runners.supervise import Event, Limits, Supervisor, Tally
from feature_extract.work import Setup, WorkItem, one_thread
from opt.config import RunAgain, UserError
from opt.data.manifest import Failure, read_manifest
from opt.data.shards import ShardReader
from opt.data.stored import StoredShard
from opt.progress import progress

KILLS = 20


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evil_worker", *local.PRELOADED])
    return context


@pytest.fixture
def whole(corpus, tmp_path) -> dict[str, bytes]:
    """What an uninterrupted job of this process writes."""
    extract(config(corpus, tmp_path / "whole"))
    return contents(tmp_path / "whole")


def record_bytes(folder) -> dict[str, bytes]:
    """Key -> the stored bytes of its features."""
    found = {}
    for receipt in read_manifest(folder).shards:
        with StoredShard(folder, receipt) as shard:
            found |= {key: bytes(shard.content(shard.rows(place)[0])) for place, key in enumerate(shard.keys)}
    return found


def test_a_sample_alone_is_the_sample_among_others(corpus, tmp_path):
    extract(config(corpus, tmp_path / "all"))
    path = corpus / "train_localized_narratives.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[5])
    extract(config(corpus, tmp_path / "alone"))
    assert record_bytes(tmp_path / "alone") == {"p5": record_bytes(tmp_path / "all")["p5"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_the_same_bytes(corpus, tmp_path, whole, workers):
    extract(config(corpus, tmp_path / "out", workers=workers))
    assert contents(tmp_path / "out") == whole
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_be_started_is_a_clear_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start", lambda _: os.close(-1))
    with pytest.raises(UserError, match="--workers: a process could not be started.*TMPDIR"):
        extract(config(corpus, tmp_path / "out", regions="none", audio="none", codes="none", workers=1))


def test_shares_write_the_same_bytes(corpus, tmp_path, whole, processes):
    job = config(corpus, tmp_path / "out", runner="static")
    ranks = [processes.Process(target=evil_worker.run_rank, args=(rank, 2, job)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "out") == whole


def test_one_share_leaves_the_rest_to_the_others(corpus, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    extract(config(corpus, tmp_path / "out", runner="static"))
    assert "the share of rank 1 (of 2) is done; 2 of 3 shards are with the others" in capsys.readouterr().out
    with pytest.raises(UserError, match="has not ended"):
        read_manifest(tmp_path / "out")
    extract(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == whole


def test_shares_that_end_together_commit_in_turn(corpus, tmp_path, monkeypatch):
    def held(out, *_):
        with (out / ".turn").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "commit", held)
    with pytest.raises(KeyboardInterrupt):
        extract(config(corpus, tmp_path / "out", regions="none", audio="none", codes="none"))


def test_ray_writes_the_same_bytes(corpus, tmp_path, whole, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    extract(config(corpus, tmp_path / "out", runner="ray", workers=2))
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("environment", "found"),
    [({"RANK": "3", "WORLD_SIZE": "8"}, Share(3, 8)),
     ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, Share(2, 4)),
     ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}, Share(3, 4))],
)
def test_a_share_is_told_by_the_environment(environment, found):
    assert share(environment) == found


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"},
     {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "--1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "²"}],
)
def test_a_share_that_makes_no_sense_is_refused(environment):
    with pytest.raises(UserError, match="--runner static"):
        share(environment)


def test_workers_go_round_the_gpus():
    assert [local.device_of(number, "cuda", 2) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert local.device_of(1, "cuda:0", 2) == "cuda:0" and local.device_of(1, "cpu", 0) == "cpu"


def test_what_hangs_and_what_crashes_is_given_up(corpus, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(local, "work_until_killed", evil_worker.run_worker)
    extract(config(corpus, tmp_path / "out", workers=2, row_seconds=3.0))
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert failures == [{"key": "p3", "part": "row", "reason": "took longer than 3 s"},
                        {"key": "p5", "part": "row", "reason": "ended its worker process (signal SIGSEGV)"}]
    found, complete = record_bytes(tmp_path / "out"), record_bytes(tmp_path / "whole")
    assert found == {key: content for key, content in complete.items() if key not in ("p3", "p5")}
    monkeypatch.undo()
    extract(config(corpus, tmp_path / "out", workers=2, retry_failed=True))
    assert contents(tmp_path / "out") == whole


class SlowDisk:
    """A worker whose rows take no time, and whose shards take long to be written."""

    def __init__(self):
        self.events, self.written = [], float("inf")

    def give(self, work):
        self.events = [Event("ready"), *(Event("row", row) for row in range(work.start, work.stop))]
        self.written = time.monotonic() + 0.3

    def hear(self):
        said, self.events = self.events, []
        return said if said or time.monotonic() < self.written else [Event("shard")]

    def ended(self):
        return ""

    def kill(self):
        """Nothing to end."""


def test_the_clock_of_a_row_does_not_run_while_the_shard_is_written():
    hired = []
    with progress("extract") as bar:
        supervisor = Supervisor(lambda *_: hired.append(SlowDisk()) or hired[-1], 1, Limits(0.1, None), Tally(), bar)
        supervisor.run([WorkItem("00000", 0, 3)])
    assert len(hired) == 1 and bar.done == 3


def test_a_file_that_ends_its_process_ends_no_job_before_it_begins(corpus, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(local, "_weigh", evil_worker.end_at_once)
    extract(config(corpus, tmp_path / "out", workers=1))
    assert "what a row weighs is not known" in capsys.readouterr().out and contents(tmp_path / "out") == whole


def test_a_worker_killed_by_chance_costs_nothing(corpus, tmp_path, whole):
    killed = []

    def kill_one():
        while not list((tmp_path / "out").glob(".0000?.tar.*.tmp")):
            time.sleep(0.001)
        killed.append(multiprocessing.active_children()[0])
        killed[0].kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    extract(config(corpus, tmp_path / "out", workers=1))
    thread.join()
    assert killed[0].exitcode == -signal.SIGKILL
    assert contents(tmp_path / "out") == whole


def test_kills_at_any_moment_leave_the_same_shards(corpus, tmp_path, processes):
    small = {"shard_size": 2, "codes": "none"}
    extract(config(corpus, tmp_path / "whole", **small))
    job = config(corpus, tmp_path / "out", **small)
    began = time.monotonic()
    timed = processes.Process(target=evil_worker.run_job, args=(config(corpus, tmp_path / "timed", **small),))
    timed.start()
    timed.join()
    seconds = time.monotonic() - began
    rng = np.random.default_rng(0)
    killed = 0
    while killed < KILLS:
        process = processes.Process(target=evil_worker.run_job, args=(job,))
        process.start()
        process.join(float(rng.uniform(0, seconds)))
        killed += process.exitcode is None
        process.kill()
        process.join()
        if (tmp_path / "out" / "manifest.json").exists():  # so far that a kill has nothing left to cost: from the start
            for path in (tmp_path / "out").iterdir():
                path.unlink()
    extract(job)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    keys = list(ShardReader(tmp_path / "out").keys())
    assert sorted(set(keys)) == [f"p{number}" for number in range(8)] and len(keys) == 9
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.slow
def test_kills_of_the_command_with_two_workers_leave_the_same_shards(corpus, tmp_path):
    """As a user would: `opt extract` killed twenty times and run again, its workers left to notice."""

    def command(out):
        return [sys.executable, "-m", "opt", "extract", "localized_narratives", str(corpus), "--out", str(out),
                "--shard-size", "1", "--workers", "2", "--device", "cpu"]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True)
    seconds = time.monotonic() - began
    rng = np.random.default_rng(1)
    killed = 0
    while killed < KILLS:
        process = subprocess.Popen(command(tmp_path / "out"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(float(rng.uniform(0.3 * seconds, seconds)))
        killed += process.returncode is None
        process.kill()
        process.wait()
        if (tmp_path / "out" / "manifest.json").exists():
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    subprocess.run(command(tmp_path / "out"), check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_sigterm_finishes_the_shard_in_hand(corpus, tmp_path, whole, processes):
    job = config(corpus, tmp_path / "out")
    process = processes.Process(target=evil_worker.run_job, args=(job,))
    process.start()
    while not list((tmp_path / "out").glob(".00000.tar.*.tmp")) and process.is_alive():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == os.EX_TEMPFAIL
    assert (tmp_path / "out" / "00000.json").exists() and not (tmp_path / "out" / "00002.json").exists()
    extract(job)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("moment", ["_open", "open_plan", "_forecast", "commit"])
def test_sigterm_before_and_after_the_work_asks_to_be_run_again(corpus, tmp_path, whole, monkeypatch, moment):
    monkeypatch.setattr(job, moment, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunAgain):
        extract(config(corpus, tmp_path / "out"))
    monkeypatch.undo()
    extract(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == whole


def test_a_worker_whose_parent_has_gone_ends_in_silence(monkeypatch):
    monkeypatch.setattr(local, "_end_with_parent", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    with one_thread():
        local.work_until_killed(Setup(None, None, None, {}, "cpu", True, False), 0, theirs)


def test_sigterm_while_workers_are_started_is_heard(corpus, tmp_path, monkeypatch):
    start = multiprocessing.context.ForkServerProcess.start
    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, "start",
                        lambda process: start(process) or os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunAgain):
        extract(config(corpus, tmp_path / "out", regions="none", audio="none", codes="none", workers=2))


def test_retrying_mends_a_record_of_which_a_part_was_lost(corpus, tmp_path, whole):
    recording = corpus / "voice" / "train" / "r4.flac"
    content = recording.read_bytes()
    recording.unlink()
    extract(config(corpus, tmp_path / "out"))
    assert record_bytes(tmp_path / "out").keys() == record_bytes(tmp_path / "whole").keys()
    recording.write_bytes(content)
    extract(config(corpus, tmp_path / "out", retry_failed=True))
    assert contents(tmp_path / "out") == whole


def test_retrying_does_only_what_failed(corpus, tmp_path, whole, monkeypatch):
    broken = corpus / "images" / "p4.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[:500])
    extract(config(corpus, tmp_path / "out"))
    untouched = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    broken.write_bytes(content)
    extract(config(corpus, tmp_path / "out"))
    assert len(read_manifest(tmp_path / "out").failures) == 1
    from feature_extract import job, work

    monkeypatch.setattr(job, "_forecast", lambda *_: "")
    read, done = work.read_media, []
    monkeypatch.setattr(work, "read_media", lambda item, *given: done.append(item.key) or read(item, *given))
    extract(config(corpus, tmp_path / "out", retry_failed=True))
    assert done == ["p4"] and contents(tmp_path / "out") == whole
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == untouched


def test_retrying_beside_a_damaged_record_names_it(corpus, tmp_path):
    (corpus / "images" / "p1.jpg").write_bytes(b"broken")
    extract(config(corpus, tmp_path / "out"))
    path = tmp_path / "out" / "00000.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="the bytes of key 'p0' are damaged"):
        extract(config(corpus, tmp_path / "out", workers=1, retry_failed=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_failures_stop_the_job(corpus, tmp_path, workers):
    for number in (1, 4, 6):
        (corpus / "images" / f"p{number}.jpg").unlink()
    with pytest.raises(UserError, match="(?s)--max-failures 1.*2  picture: missing file"):
        extract(config(corpus, tmp_path / "out", max_failures=1, workers=workers))
    extract(config(corpus, tmp_path / "out", max_failures=3, workers=workers))
    assert len(read_manifest(tmp_path / "out").failures) == 3


def test_the_tally_says_what_fails_most():
    tally = Tally()
    reasons = ["picture 0: missing file", "recording 2: broken recording (x)", "picture 1: missing file"]
    tally.add([Failure(f"k{number}", reason) for number, reason in enumerate([*reasons, "caption 0: empty"])])
    assert tally.note() == "4 failed: 2 picture: missing file, 1 recording: broken recording, ..."
    assert tally.table()[0] == "       2  picture: missing file, such as k0"


def test_a_full_disk_is_a_clear_error_and_costs_only_the_shard(corpus, tmp_path, whole, monkeypatch):
    """Writes fail as on a full disk after a while; the folder stays in order and the job can go on."""
    import opt.files

    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(opt.files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out(/0000\d\.(tar|npy|json))?'"):
        extract(config(corpus, tmp_path / "out"))
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    extract(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == whole
