"""What a system carries from step to step, a queue and a slow twin, is part of the state; skipped steps enter none."""

import copy
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from torch import Tensor, nn
from training import MODEL

from opt.config import RunAgain
from opt.data.batch import Batch
from opt.data.shards import ShardReader
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import OPT
from opt.systems.system import Output, Progress
from pretrain.trainer import Trainer

SIZE = 20


class Remembering(OPT):
    """OPT with a queue of first states, where the next one goes, and a slow twin of its match head."""

    queue: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__(MODEL, tokenizer(), FACTS)
        self.twin = copy.deepcopy(self.match_head).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(SIZE, MODEL.width))
        self.register_buffer("place", torch.tensor(0))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        output = super().forward(batch, progress)
        carried = self.encode(batch)[1][:3].detach().float()
        if progress.step == 4:
            mlm = output.terms["mlm"]
            output.terms["mlm"] = type(mlm)(mlm.total * float("nan"), mlm.count)
            carried = carried * float("nan")
        return Output(output.terms, {"first": carried})

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        super().after_step(carries, kept)
        new = torch.cat([carry["first"] for carry in carries])
        places = (self.place + torch.arange(len(new))) % SIZE
        self.queue[places] = torch.where(kept, new, self.queue[places])
        self.place.add_(len(new) * kept).remainder_(SIZE)
        for slow, fast in zip(self.twin.parameters(), self.match_head.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)


def train(reader: ShardReader, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    loop = LoopConfig(steps=12, batch_tokens=500, workers=0, save_every=3, accumulate=2)
    trainer = Trainer(Remembering(), reader, folder, loop, OptimConfig())
    trainer.run()
    return trainer.system


def test_a_queue_and_a_twin_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(64)])
    whole = train(reader, tmp_path / "whole")
    step = Trainer.train_step

    def stop_at_seven(self: Trainer, batches: list[Batch]) -> object:
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patched, pytest.raises(RunAgain):
        patched.setattr(Trainer, "train_step", stop_at_seven)
        train(reader, tmp_path / "stopped")
    stopped = train(reader, tmp_path / "stopped")
    expected, found = whole.state_dict(), stopped.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected["place"] == 11 * 2 * 3 % SIZE, "eleven steps of twelve entered"
    assert torch.isfinite(expected["queue"]).all() and expected["queue"].abs().sum(1).all()
    assert not torch.equal(expected["twin.weight"], expected["match_head.weight"])
