"""Validation: the loss on held-out shards, always the same batches, and what follows from it.

    held-out shards --a plan of their own--> the same batches each time --evaluation mode--> loss --> best model, end

Rows are corrupted as in training, each from its own fixed key, so that two validations differ by the weights alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from opt.config import UserError
from opt.data.loader import Loader
from opt.data.plan import Plan
from opt.data.shards import ShardReader
from opt.distributed import rank, sum_over_ranks, world
from opt.recipe import LoopConfig
from opt.systems.system import Preparer, Progress
from pretrain.parallel import counted_together

SEED = 1_000_003
"""Seed of the held-out order and of what is drawn while validating."""


@dataclass
class Best:
    """The best validation so far, and how many have come since: part of a run's state."""

    loss: float = math.inf
    step: int = 0
    since: int = 0

    def take(self, loss: float, step: int) -> bool:
        """Count a validation; whether it is the best."""
        better = loss < self.loss
        if better:
            self.loss, self.step, self.since = loss, step, 0
        else:
            self.since += 1
        return better


class Validation:
    """The held-out loss of a system as it stands."""

    def __init__(self, reader: ShardReader, preparer: Preparer, loop: LoopConfig) -> None:
        self.reader, self.preparer, self.loop = reader, preparer, loop
        costs, tokens = preparer.cost(reader.lengths), max(1, loop.batch_tokens // loop.accumulate)
        try:
            self.plan = Plan(SEED, costs, tokens, preparer.tasks, reader.key_hash, loop.multiple)
        except UserError as error:
            raise UserError(f"held-out samples (--validation): {error}") from error

    def run(self, module: nn.Module, device: torch.device, bfloat16: bool, progress: Progress) -> dict[str, Any]:
        """`loss` and `losses`: means over everything that counts in all batches, whichever process saw it."""
        totals: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        module.eval()
        for batches, _ in islice(self._loader(), self.loop.validate_batches):
            (batch,) = counted_together(batches)
            torch.manual_seed(SEED + rank())
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                terms = module(batch.to(device), progress).terms
            for name, term in terms.items():
                totals[name] = totals.get(name, torch.zeros_like(term.total)) + term.total
                counts[name] = counts.get(name, torch.zeros_like(term.count)) + term.count
                weights[name] = term.weight
        module.train()
        totals = sum_over_ranks({name: total.float().cpu() for name, total in totals.items()})
        losses = {name: float(totals[name] / counts[name].cpu()) for name in totals if counts[name] > 0}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), "losses": losses}

    def _loader(self) -> Loader:
        return Loader(self.reader, self.plan, self.preparer, 0, rank(), world(), workers=min(1, self.loop.workers))
