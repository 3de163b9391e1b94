"""Compiled blocks: torch.compile for every transformer block of a system, in place.

Graphs are made for fixed numbers of tokens, which opt.data.capacity keeps few; the number of sequences, their longest
and the length of a context may change freely. Blocks of one kind share their code. Attention on CPUs stays outside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.block import Block, Stack

SHAPES = 64
"""Graphs before torch gives up compiling: kinds of blocks x sizes of batches x training or not."""


def compile_blocks(system: nn.Module, backend: str | Any = "inductor") -> None:
    """Compiles every Block of the system in place; parameters and their names stay as they are."""
    for module in system.modules():
        if isinstance(module, Block):
            module.compile(backend=backend, dynamic=False, recompile_limit=SHAPES)
        elif isinstance(module, Stack):
            module.register_forward_pre_hook(_mark, with_kwargs=True)


def uncompiled() -> AbstractContextManager[None]:
    """Blocks as they are, for tokens in numbers that nobody can foresee: each would make a graph of its own."""
    return torch.compiler.set_stance("force_eager")


def _mark(stack: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Tells torch.compile which sizes may change: all but that of the first input, the tokens."""
    from torch._dynamo import maybe_mark_dynamic  # takes a second to import

    for value in [*inputs[1:], *named.values()]:
        if isinstance(value, AttentionLayout):
            maybe_mark_dynamic(value.query_borders, 0)
            maybe_mark_dynamic(value.key_borders, 0)
            maybe_mark_dynamic(value.longest, [0, 1])
        elif isinstance(value, Tensor):
            maybe_mark_dynamic(value, 0)
