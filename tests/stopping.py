"""The proof of exact resume, shared by every verb that trains."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opt.checkpoint import from_pretrained
from opt.config import RunAgain
from pretrain.state import newest_state
from pretrain.trainer import Trainer


def stopped_equals_whole(start: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` trains 12 steps into a folder. One run is stopped by SIGTERM in its seventh step and started again: its
    weights and logged losses equal those of a run that was not, bit for bit."""
    start(folder / "whole")
    step = Trainer.train_step

    def stop_at_seven(self: Trainer, batches: object) -> object:
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", stop_at_seven)
    with pytest.raises(RunAgain, match="after step 7 of 12"):
        start(folder / "stopped")
    newest = newest_state(folder / "stopped" / "checkpoints")
    assert newest is not None and newest.name == "step-00000007" and not (folder / "stopped" / "model").exists()
    monkeypatch.undo()
    start(folder / "stopped")
    whole, stopped = (from_pretrained(folder / run / "model").state_dict() for run in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)
    logged = [[json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
              for run in ("whole", "stopped")]
    assert [line["step"] for line in logged[0]] == [line["step"] for line in logged[1]]
    assert logged[0][-1]["losses"] == logged[1][-1]["losses"]
