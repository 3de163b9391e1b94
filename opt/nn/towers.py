"""Towers: one modality of a batch through an encoder of its own.

    table --embedder--> entries (learned first entry, then the table's) --gather of the view--> Stack --> States

Shape legend: N packed tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opt.data.batch import View
from opt.nn.block import Stack
from opt.nn.states import States


class Tower(nn.Module):
    """An embedder of one table and the stack that reads its sequences."""

    def __init__(self, embedder: nn.Module, stack: Stack) -> None:
        super().__init__()
        self.embedder, self.stack = embedder, stack

    def forward(self, table: Any, view: View) -> States:
        """The sequences of a view of that table."""
        return States.of(self.stack(self.entries(table, view), view.layout), view)

    def entries(self, table: Any, view: View) -> Tensor:
        """The view's tokens before the stack: (N, D)."""
        return nn.functional.embedding(view.gather, self.embedder(table))
