"""The supervisor against workers that do as they are told here: which rows are given up, when a job ends."""

import pytest

from feature_extract.runners import supervise
from feature_extract.runners.supervise import Event, Limits, Supervisor, Tally
from feature_extract.work import WorkItem
from opt.config import UserError
from opt.data.manifest import Failure


class Told:
    """A worker that dies at the rows `deadly` (row `stop`: while it writes the shard), unless they are given up."""

    deadly: dict[int, int] = {}
    """Row -> how often it still kills."""
    written: dict[str, dict[int, str]] = {}
    """Shard -> the rows that were given up."""

    def __init__(self, number: int) -> None:
        self.said: list[Event] = []
        self.how = ""

    def give(self, work: WorkItem) -> None:
        self.said.append(Event("ready"))
        for row in [*range(work.start, work.stop), work.stop]:
            if row not in work.given_up and self.deadly.get(row, 0):
                self.deadly[row] -= 1
                self.how = "signal SIGKILL"
                return
            if row < work.stop:
                self.said.append(Event("row", row, (Failure("k", "picture 0: missing file"),) if row == 2 else ()))
        self.written[work.name] = work.given_up
        self.said.append(Event("shard"))

    def hear(self) -> list[Event]:
        said, self.said = self.said, []
        return said

    def ended(self) -> str:
        return self.how

    def kill(self) -> None:
        pass


class Bar:
    done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(Told, "deadly", {})
    monkeypatch.setattr(Told, "written", {})
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0)


def run(workers: int = 2, row_seconds: float = 60.0) -> tuple[int, Tally]:
    bar, tally, todo = Bar(), Tally(), [WorkItem("00000", 0, 4), WorkItem("00001", 4, 8)]
    Supervisor(Told, workers, Limits(row_seconds, None), tally, bar).run(todo)
    return bar.done, tally


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_shards_are_done_once(workers):
    done, tally = run(workers)
    assert done == 8 and Told.written == {"00000": {}, "00001": {}} and tally.kinds == {"picture: missing file": 1}


def test_one_death_is_chance():
    Told.deadly[5] = 1
    done, _ = run(1)
    assert done == 8 and Told.written == {"00000": {}, "00001": {}}


def test_a_row_that_kills_again_is_given_up_and_failures_are_counted_once():
    Told.deadly[3] = 100
    done, tally = run()
    assert done == 8 and Told.written == {"00000": {3: "ended its worker process (signal SIGKILL)"}, "00001": {}}
    assert tally.kinds == {"picture: missing file": 1}


def test_two_deadly_rows_of_a_shard_are_both_given_up():
    Told.deadly |= {1: 100, 2: 100}
    run()
    assert Told.written["00000"].keys() == {1, 2}


def test_workers_that_die_writing_end_the_job():
    Told.deadly[4] = 100
    with pytest.raises(UserError, match="workers end while they write shard 00000"):
        run(1)


def test_a_worker_that_cannot_begin_ends_the_job(monkeypatch):
    monkeypatch.setattr(Told, "give", lambda self, work: setattr(self, "how", "exit status 1"))
    with pytest.raises(UserError, match="a worker could not begin .exit status 1."):
        run()


def test_a_row_without_end_is_given_up(monkeypatch):
    give = Told.give

    def hang(self, work):
        if work.start == 4 and 4 not in work.given_up:
            self.said.append(Event("ready"))
        else:
            give(self, work)

    monkeypatch.setattr(Told, "give", hang)
    run(2, 0.2)
    assert Told.written == {"00000": {}, "00001": {4: "took longer than 0.2 s"}}
