"""A batch moves whole: as one storage where its tensors share one, and equal tensor for tensor."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.data import batch as batches
from opt.data.batch import Batch
from opt.data.loader import _pack, _Unpacker
from opt.data.plan import BatchPlan
from opt.systems.opt import OPTConfig, Rows


def prepared() -> Batch:
    config = OPTConfig(width=16, layers=1, heads=2, inner=16, decoder_layers=1, alignment_weight=1.0)
    rows, numbers = Rows(config, tokenizer(), FACTS.region_width, FACTS.speech_width, FACTS.codebook), np.arange(6)
    plan = BatchPlan(numbers, numbers, np.stack([numbers - 1, numbers - 2], 1) % 6, numbers.astype(np.uint64), 0, 0, 6)
    return rows({number: fake_sample(number) for number in range(6)}, plan)


def received() -> Batch:
    """The batch as a loader hands it out."""
    return _Unpacker(*_pack(prepared())).load()


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    batches._apply(batch, collect)
    return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every copy to another device. CPU tensors stand in for those of a GPU."""
    copies: list[int] = []

    def to(tensor: torch.Tensor, device: Any, **how: Any) -> torch.Tensor:
        copies.append(tensor.nbytes)
        return real(tensor, device)

    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", to)
    return copies


def test_a_loaders_batch_moves_in_one_copy(sent: list[int]) -> None:
    batch = received()
    moved = batch.to("meta")
    assert len(sent) == 1 and sent[0] >= sum(tensor.nbytes for tensor in tensors(batch))
    assert len({tensor.untyped_storage()._cdata for tensor in tensors(moved)}) == 1
    for before, after in zip(tensors(batch), tensors(moved), strict=True):
        assert after.device.type == "meta"
        assert (after.shape, after.stride(), after.dtype) == (before.shape, before.stride(), before.dtype)
        assert after.storage_offset() == before.storage_offset()


def test_counts_summed_over_processes_move_beside_it(sent: list[int]) -> None:
    batch = received()
    summed = torch.stack([*batch.counts.values()]).unbind()
    batch = dataclasses.replace(batch, counts=dict(zip(batch.counts, summed, strict=True)))
    assert all(tensor.device.type == "meta" for tensor in tensors(batch.to("meta")))
    assert len(sent) == 2


def test_what_is_moved_holds_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = received()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: tensor.clone())  # another place in memory
    mover = batches._Mover(torch.device("cpu"))
    mover.device = torch.device("cpu", 0)  # differs from "cpu", and is the same
    for before, after in zip(tensors(batch), tensors(batches._apply(batch, mover)), strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype
        assert not before.numel() or before.data_ptr() != after.data_ptr()


def test_a_batch_that_is_there_stays_as_it_is() -> None:
    batch = prepared()
    assert all(before is after for before, after in zip(tensors(batch), tensors(batch.to("cpu")), strict=True))


def test_padded_tokens_are_those_that_attention_computes() -> None:
    batch = prepared()
    layouts = [batch.views["encoder"].layout, *(writing.layout for writing in batch.writings.values())]
    assert batch.padded == sum(len(layout.query) for layout in layouts) > batch.tokens
    assert dataclasses.replace(batch, views={}, writings={}).padded == batch.tokens
