"""Metrics: sums of shares are what one process would say, skipped steps leave no trace, lines survive a resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from opt.objectives.term import Term
from pretrain import metrics
from pretrain.estimate import Peak, Work
from pretrain.metrics import Meter, MetricsFile, memory_in_use, note

BATCH = SimpleNamespace(tokens=30, padded=40)
YES, NO = torch.tensor(True), torch.tensor(False)


def term(total, count, weight=1.0):
    return Term(torch.tensor(float(total), requires_grad=True), torch.tensor(float(count)), weight)


def test_shares_of_micro_batches_add_up_and_counts_are_the_steps():
    meter = Meter()
    for shares in (((6.0, 2.0), (2.0, 1.0)), ((3.0, 1.0), (1.0, 0.0))):  # two steps of two micro-batches
        for words, regions in zip(*shares, strict=True):
            terms = {"words": term(words, 4), "regions": term(regions, 2)}
            meter.add(terms, torch.tensor(words / 4 + regions / 2), BATCH)
        meter.step(YES, torch.tensor(2.0))
    line = meter.line(0.0)
    assert line["losses"] == {"words": (6 + 2 + 3 + 1) / 8, "regions": (2 + 1 + 1 + 0) / 4}
    assert line["loss"] == pytest.approx(line["losses"]["words"] + line["losses"]["regions"])
    assert line["gradient_norm"] == 2.0 and line["skipped_steps"] == 0


def test_a_term_that_counted_nothing_is_not_logged_as_nought():
    meter = Meter()
    meter.add({"some": term(6, 3), "none": term(0, 0)}, torch.tensor(2.0), BATCH)
    meter.step(YES, torch.tensor(1.0))
    assert meter.line(0.0)["losses"] == {"some": 2.0}


def test_a_step_that_was_not_kept_leaves_no_trace_but_its_tokens():
    meter = Meter()
    for loss, kept in ((2.0, YES), (math.nan, NO), (math.inf, NO), (4.0, YES)):
        meter.add({"a": term(loss, 1)}, torch.tensor(loss), BATCH)
        meter.step(kept, torch.tensor(loss))
    line = meter.line(0.0)
    assert (line["loss"], line["losses"], line["gradient_norm"]) == (3.0, {"a": 3.0}, 3.0)
    assert line["skipped_steps"] == 2 and line["tokens_per_second"] * line["seconds"] == pytest.approx(120, rel=0.01)


def test_a_line_of_skipped_steps_alone_says_so_and_the_next_begins_anew():
    meter = Meter()
    meter.add({"a": term(math.nan, 1)}, torch.tensor(math.nan), BATCH)
    meter.step(NO, torch.tensor(math.nan))
    line = meter.line(0.0)
    assert (line["loss"], line["losses"], line["gradient_norm"], line["skipped_steps"]) == (None, {}, None, 1)
    assert note(line).startswith("all steps skipped") and "NaN" not in json.dumps(line)
    meter.add({"a": term(5, 1)}, torch.tensor(5.0), BATCH)
    meter.step(YES, torch.tensor(1.0))
    assert meter.line(0.0)["loss"] == 5.0


def test_speed_share_of_peak_and_waiting(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    meter = Meter(Work(6e6, 60, 0, 0, 0), Peak(1e7, "made up"))
    for _ in range(4):
        meter.add({"a": term(1, 1)}, torch.tensor(1.0), BATCH)
        meter.step(YES, torch.tensor(1.0))
    meter.pause(6.0)
    clock.now = 110.0
    line = meter.line(1.0)
    assert line["seconds"] == 4.0 and line["tokens_per_second"] == 30.0 and line["padded_tokens_per_second"] == 40.0
    assert line["mfu"] == pytest.approx(30 * 1e5 / 1e7) and line["wait_share"] == 0.25
    meter.add({"a": term(1, 1)}, torch.tensor(1.0), BATCH)
    meter.step(YES, torch.tensor(1.0))
    clock.now = 112.0
    assert meter.line(1.5)["wait_share"] == 0.25  # only what was waited since


def test_without_an_estimate_there_is_no_share_of_peak():
    meter = Meter()
    meter.add({"a": term(1, 1)}, torch.tensor(1.0), BATCH)
    meter.step(YES, torch.tensor(1.0))
    assert "mfu" not in meter.line(0.0)


def test_two_processes_say_what_one_would(monkeypatch):
    """Counts are global on both, totals are shares; the sum is taken in the second one's place."""
    monkeypatch.setattr(metrics, "world", lambda: 2)
    monkeypatch.setattr(metrics, "memory_in_use", lambda device: 2**30 * (1 if metrics.rank() else 3))
    sent = {}

    def collect(values):
        before = sent.setdefault(tuple(values), [])
        before.append(values)
        return {name: sum(each[name] for each in before) for name in values}

    monkeypatch.setattr(metrics, "sum_over_ranks", collect)
    for rank, total in enumerate((6.0, 4.0)):
        monkeypatch.setattr(metrics, "rank", lambda rank=rank: rank)
        meter = Meter(Work(1.0, 1, 0, 0, 0), Peak(1.0, ""))
        meter.add({"a": term(total, 5)}, torch.tensor(total / 5), BATCH)
        meter.step(YES, torch.tensor(7.0))
        line = meter.line(0.0)
    assert line["loss"] == pytest.approx(2.0) and line["losses"]["a"] == pytest.approx(2.0)
    assert line["gradient_norm"] == pytest.approx(7.0) and line["skipped_steps"] == 0 and line["memory_gib"] == 3.0
    assert line["tokens_per_second"] * line["seconds"] == pytest.approx(60, rel=0.01)
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] / 2, rel=0.01)


def test_memory_grows_with_what_is_held():
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(2**24)
    assert memory_in_use(torch.device("cpu")) - before > 0.9 * held.nbytes


def line(step, **more):
    return {"step": step, "loss": 1.0, "seconds": 2.0, "tokens_per_second": 5.0, "wait_share": 0.0, **more}


def test_a_resumed_run_drops_later_lines_and_goes_on_counting_seconds(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    sink = SimpleNamespace(append=seen.append)
    file = MetricsFile(path, 0, sink)
    for step in (2, 4, 6):
        assert file.append(line(step)).startswith("loss 1.000")
        if step > 2:
            assert file.append({"step": step, "validation": {"loss": 3.0, "losses": {}}}) == "validation 3.000"
            file.append({"step": step, "validation": {"loss": 3.5, "losses": {}}})
    assert [each["step"] for each in seen] == [2, 4, 4, 4, 6, 6, 6]
    with path.open("a") as cut:
        cut.write('{"step": 6, "lo')
    file = MetricsFile(path, 4)
    assert file.seconds == 4.0
    file.append(line(6))
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [each["step"] for each in lines] == [2, 4, 4, 4, 6]
    assert ["validation" in each for each in lines] == [False, False, True, True, False]
    assert lines[-1]["seconds"] == 6.0


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(8)) + "\n")
    monkeypatch.setattr(metrics, "rank", lambda: 1)
    MetricsFile(path, 4).append(line(6))
    assert json.loads(path.read_text())["step"] == 8
