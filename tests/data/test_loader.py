"""The loader: the same batches whatever the workers, from any position; errors that name their sample."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from opt.config import UserError
from opt.data.loader import Loader, _pack, _Unpacker
from opt.data.manifest import write_manifest
from opt.data.plan import BatchPlan, Plan, Tasks
from opt.data.record import Narration, Record, Sample
from opt.data.shards import ShardReader, ShardWriter

TASKS = Tasks(("read", "match"), (0.5, 0.5), ("match",))


class Preparer:
    """Sums each row's speech, adds its partners' and noise from its key: everything a batch may depend on."""

    jpeg = False

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> dict[str, Tensor]:
        wanted = {*plan.sample.tolist(), *plan.partners.ravel().tolist()} - {-1}
        assert wanted <= set(samples)
        rows = []
        for number, partners, key in zip(plan.sample, plan.partners, plan.key, strict=True):
            if samples[number].key == self.broken:
                raise ZeroDivisionError
            speech = [samples[n].speech for n in (number, *partners) if n >= 0]
            noise = np.random.Generator(np.random.Philox(key=int(key))).random()
            rows.append(noise + sum(float(one.sum()) for one in speech if one is not None))
        return {"value": torch.tensor(rows), "sample": torch.from_numpy(plan.sample), "threads": one_thread()}


def one_thread() -> Tensor:
    return torch.tensor(torch.get_num_threads())


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    rng = np.random.default_rng(0)
    for shard in range(3):
        with ShardWriter(tmp_path, f"{shard:05d}") as writer:
            for number in range(20):
                speech = rng.standard_normal((4, 3)).astype(np.float16)
                writer.write(Record(f"k{shard}-{number}", (), (Narration("0", "words", speech, 10.0, 0.4),)))
    write_manifest(tmp_path, [f"{shard:05d}" for shard in range(3)], {}, (), 0)
    return ShardReader(tmp_path)


def plan(reader: ShardReader) -> Plan:
    return Plan(0, reader.lengths.frames + reader.lengths.words, 80, TASKS, reader.key_hash, 4)


def take(loader: Loader, count: int) -> list[tuple[list[float], list[int], int]]:
    return [(b["value"].tolist(), b["sample"].tolist(), position) for (b,), position in islice(loader, count)]


def test_workers_change_nothing(reader: ShardReader) -> None:
    alone = take(Loader(reader, plan(reader), Preparer(), workers=0), 12)
    for workers in (1, 2):
        assert take(Loader(reader, plan(reader), Preparer(), workers=workers), 12) == alone
        resumed = Loader(reader, plan(reader), Preparer(), position=alone[4][2], workers=workers)
        assert take(resumed, 7) == alone[5:]
    assert [position for *_, position in alone[:-1]] == [b.position for b in islice(plan(reader).batches(), 1, 12)]


def test_ranks_read_their_rows(reader: ShardReader) -> None:
    whole = take(Loader(reader, plan(reader), Preparer(), workers=0), 5)
    parts = [take(Loader(reader, plan(reader), Preparer(), rank=r, world=2, workers=0), 5) for r in range(2)]
    for (values, samples, position), *halves in zip(whole, *parts, strict=True):
        for rank, half in enumerate(halves):
            assert half == (values[rank::2], samples[rank::2], position)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_micro_batches_of_all_ranks_make_up_the_batch(reader: ShardReader, workers: int) -> None:
    whole = take(Loader(reader, plan(reader), Preparer(), workers=0), 5)
    for world, micros in [(1, 2), (2, 2), (1, 4), (4, 1)]:
        ranks = [
            list(islice(Loader(reader, plan(reader), Preparer(), 0, rank, world, micros, workers), 5))
            for rank in range(world)
        ]
        for (values, samples, position), *parts in zip(whole, *ranks, strict=True):
            for rank, (batches, after) in enumerate(parts):
                assert after == position and len(batches) == micros
                for micro, batch in enumerate(batches):
                    assert batch["value"].tolist() == values[micro::micros][rank::world]
                    assert batch["sample"].tolist() == samples[micro::micros][rank::world]


def test_samples_are_fetched_together_before_they_are_read(reader: ShardReader) -> None:
    class Far(ShardReader):
        def prefetch(self, numbers: Sequence[int], jpeg: bool = False) -> None:
            self.here = set(numbers)

        def sample(self, number: int, jpeg: bool = False) -> Sample:
            self.here.remove(number)
            return super().sample(number, jpeg)

    far = Far(reader.folder)
    expected = take(Loader(reader, plan(reader), Preparer(), workers=0), 5)
    assert take(Loader(far, plan(reader), Preparer(), workers=0), 5) == expected and not far.here


def test_steps_that_do_not_split_are_refused(reader: ShardReader) -> None:
    for world, micros, said in [
        (3, 1, r"groups of 4 \(--loop.multiple\) do not split among 3 processes x 1 micro-batches \(--loop.accumulate"),
        (2, 4, "among 2 processes x 4 .*to a multiple of 8.* divides 4"), (1, 0, "--loop.accumulate 0"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            Loader(reader, plan(reader), Preparer(), world=world, micro_batches=micros)
    with pytest.raises(UserError, match="-1 workers"):
        Loader(reader, plan(reader), Preparer(), workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_sample(reader: ShardReader, workers: int) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError.*position \d+.*on 'k1-7'"):
        take(Loader(reader, plan(reader), Preparer("k1-7"), workers=workers), 20)
    content = bytearray((reader.folder / "00002.tar").read_bytes())
    content[700] ^= 1
    (reader.folder / "00002.tar").write_bytes(content)
    with pytest.raises(UserError, match="key 'k2-0' are damaged"):
        take(Loader(reader, plan(reader), Preparer(), workers=workers), 20)


def test_workers_use_one_thread_and_end(reader: ShardReader) -> None:
    loader = Loader(reader, plan(reader), Preparer(), workers=2)
    batches = iter(loader)
    (batch,), _ = next(batches)
    assert int(batch["threads"]) == 1 and len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_many_tensors_need_few_open_files(reader: ShardReader) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    try:
        for (batch,), _ in islice(Loader(reader, plan(reader), ManyTensors(), workers=2), 12):
            assert len(batch["many"]) == 300
            for number, tensor in enumerate(batch["many"]):
                assert torch.equal(tensor, torch.full((number % 7, 3), number, dtype=tensor.dtype))
            assert batch["mask"].dtype == torch.bool and batch["mask"].tolist() == [True, False]
            assert batch["one"].shape == () and batch["one"] == 5 and batch["name"] == "as it is"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class ManyTensors:
    jpeg = False

    def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> dict[str, object]:
        kinds = [torch.int64, torch.float32, torch.float16, torch.bfloat16]
        many = tuple(torch.full((number % 7, 3), number, dtype=kinds[number % 4]) for number in range(300))
        return {"many": many, "mask": torch.tensor([True, False]), "one": torch.tensor(5), "name": "as it is"}


def test_waiting_is_counted(reader: ShardReader) -> None:
    class Slow(Preparer):
        def __call__(self, samples: dict[int, Sample], plan: BatchPlan) -> dict[str, Tensor]:
            time.sleep(0.05)
            return super().__call__(samples, plan)

    loader = Loader(reader, plan(reader), Slow(), workers=0)
    take(loader, 4)
    assert 0.2 <= loader.waited < 2


@pytest.mark.parametrize("tensor", [
    torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3).T, torch.zeros(0, 4), torch.tensor(2.5),
    torch.tensor([7]).as_strided((1,), (0,)), torch.tensor([True, False]), torch.arange(10)[3:7],
])
def test_any_tensor_travels(tensor: torch.Tensor) -> None:
    """One element may carry stride 0 and still count as contiguous."""
    again = _Unpacker(*_pack({"tensor": tensor})).load()["tensor"]
    assert again.dtype == tensor.dtype and torch.equal(again, tensor)


def test_workers_leave_signals_to_their_parent(reader: ShardReader) -> None:
    """A scheduler's SIGTERM or Ctrl-C reaches every process; the trainer still finishes its step and saves."""
    loader = iter(Loader(reader, plan(reader), Preparer(), workers=1))
    first = next(loader)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    assert [next(loader)[1] for _ in range(6)][0] > first[1]
