"""Steps that were skipped because their loss or gradient was not finite: named, counted, and too many end the run.

Whether a step was kept is known to the device at once and to the program only at the next `review`, so that no step
waits for it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from opt.config import UserError
from opt.distributed import rank, world
from pretrain.lines import keep_until
from pretrain.parallel import say

NAMED = 8
"""Keys of a batch that a message names; skipped.jsonl has all."""


class Guard:
    """Watches the steps of a run. `in_a_row`: skipped ones at the end of what was reviewed, part of the run's state."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self.in_a_row = path, most, 0
        self._recent: list[tuple[int, list[str], Tensor]] = []

    def watch(self, step: int, keys: list[str], kept: Tensor) -> None:
        """Remember a step, its samples on this process, and whether it moved the weights (bool, on the device)."""
        self._recent.append((step, keys, kept))

    def forget_after(self, step: int) -> None:
        """Drop what an earlier start named beyond a step that the run goes on from: it is done again."""
        if rank() == 0:
            keep_until(self.path, step)

    def review(self) -> None:
        """Name what was skipped since the last review, in skipped.jsonl too. Waits for the device; every process must
        call it at the same step.

        Raises UserError when `most` steps in a row were skipped.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return
        for (step, keys, _), kept in zip(recent, torch.stack([kept for *_, kept in recent]).tolist(), strict=True):
            self.in_a_row = 0 if kept else self.in_a_row + 1
            if not kept:
                self._name(step, _of_all_processes(keys))
            if self.in_a_row >= self.most:
                raise UserError(
                    f"the loss or its gradient was not finite in {self.most} steps in a row, the last of them "
                    f"{step}; {self.path} names their samples. Look at these, or begin another run (--out) with what "
                    f"was learned: --start model:{self.path.parent / 'model'} with --loop.precision float32 or a "
                    "lower --optim.learning-rate"
                )

    def _name(self, step: int, keys: list[str]) -> None:
        if rank() != 0:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "keys": keys}) + "\n")
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        say(f"step {step} was skipped: its loss or gradient is not finite, with {', '.join(keys[:NAMED])}{more} "
            "in the batch")


def _of_all_processes(keys: list[str]) -> list[str]:
    if world() == 1:
        return keys
    gathered: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(gathered, keys)
    return [key for each in gathered for key in each]
