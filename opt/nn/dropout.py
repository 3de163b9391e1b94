"""Dropout that a CPU draws fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """nn.Dropout, but on CPUs four entries share one random number, 16 bits for each: drawing them one by one takes
    longer than everything else that is done to an entry."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden: Tensor) -> Tensor:
        """Entries are zero with a chance of `share`, the others larger by as much, while training."""
        if not self.training or self.share == 0.0 or hidden.device.type != "cpu":
            return F.dropout(hidden, self.share, self.training)
        numbers = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.int16)[: hidden.numel()].view(hidden.shape) >= round(self.share * 2**16) - 2**15
        return hidden * kept.to(hidden.dtype).mul_(1 / (1 - self.share))
