"""Reading ahead of the networks: in order, far enough, and never more than memory bears; what a job forecasts."""

import threading
import time

import pytest

from feature_extract import profiles, work
from feature_extract.assemble import Media
from feature_extract.plan import Row
from feature_extract.profiles import Weight, forecast
from feature_extract.runners.supervise import Tally
from feature_extract.sources.item import Item
from opt.data.manifest import Failure

ROWS = [Row(Item(str(number))) for number in range(40)]


class Big(Media):
    """Media of 100 bytes."""

    size = 100


def consumed(most: int, monkeypatch, held: int) -> tuple[list[str], int]:
    """The keys in order, and how far reading was at most ahead of what was taken."""
    monkeypatch.setattr(work, "READ_AHEAD_BYTES", held)
    lock, read, taken, furthest = threading.Lock(), [], [], 0

    def reading(row: Row) -> Media:
        with lock:
            read.append(row.item.key)
        return Big(row.item)

    for media in work.ahead(reading, ROWS, most):
        taken.append(media.item.key)
        time.sleep(0.002)
        furthest = max(furthest, len(read) - len(taken))
    return taken, furthest


@pytest.mark.parametrize(("most", "held", "least", "limit"), [(8, 10**9, 6, 9), (8, 250, 1, 5), (0, 10**9, 0, 0)])
def test_reading_ahead_is_in_order_and_bounded(monkeypatch, most, held, least, limit):
    taken, furthest = consumed(most, monkeypatch, held)
    assert taken == [row.item.key for row in ROWS]
    assert least <= furthest <= limit


def test_an_error_of_ours_while_reading_is_not_swallowed():
    def broken(row: Row) -> Media:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        list(work.ahead(broken, ROWS, 8))


def test_the_forecast_warns_when_the_disk_has_less(tmp_path, monkeypatch):
    weight = Weight(2_000_000, 8, 8, Tally())
    assert "LESS" not in (said := forecast(tmp_path / "new" / "out", 10, weight, "standard"))
    assert "2,000,000 bytes a row (mean of 8), about 20.0 MB for 10 rows" in said
    assert forecast(tmp_path, 10**12, weight, "standard").endswith("; THE DISK HAS LESS")


def test_the_forecast_says_why_nothing_can_be_used(tmp_path):
    tally = Tally()
    tally.add([Failure("k", "picture 0: missing file")] * 3)
    assert forecast(tmp_path, 10, Weight(0.0, 0, 3, tally), "full").splitlines() == [
        "none of the 3 rows tried can be used:", "       3  picture: missing file, such as k"]
    assert profiles.PROFILES.keys() == {"full", "standard", "compact"}
