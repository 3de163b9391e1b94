"""Several processes as one: torchrun's environment -> process group and device -> the system, wrapped.

    torchrun --nproc-per-node 8 -m opt pretrain opt.paper ...

ddp    every process holds the whole model; gradients are summed while the backward pass still runs
fsdp   every process holds a share of weights, gradients and moments; a block's weights are gathered when it is needed

Gradients are summed, never averaged: a process's loss is its share of the global one (opt/objectives/term.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opt.config import UserError
from opt.data.batch import Batch
from opt.distributed import rank, sum_over_ranks, world
from opt.nn.block import Block
from opt.nn.multiway import MultiwayBlock
from opt.recipe import LoopConfig

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for one that is slower: saving and starting take longest."""


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun (or srun, with the same variables) started, and give this one's device.

    Alone nothing is joined. Raises UserError where the variables are incomplete or name a GPU that is not there.
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device("cuda" if cuda else "cpu")
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; start with "
                        "torchrun, or set what it sets (docs/training.md)")
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start one process "
                        "for each GPU")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Parallel:
    """A system as all processes train it together. `module` is what is called; in one process it is the system."""

    def __init__(self, system: nn.Module, loop: LoopConfig, device: torch.device) -> None:
        self.system, self.module = system, system
        self.sharded = loop.parallel == "fsdp"
        if not dist.is_initialized():
            return
        if self.sharded:
            _shard(system, init_device_mesh(device.type, (dist.get_world_size(),)))
            return
        replicated = DistributedDataParallel(
            system, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        replicated.register_comm_hook(None, lambda _, bucket: _summed(bucket))
        self.module = replicated

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward: gradients go between processes with the `last` one of a step."""
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if last else self.module.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        return nullcontext()


def of_first(make: Callable[[], Result]) -> Result:
    """What `make` gives in the first process, for all of them; all end with its UserError or OSError."""
    if world() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if rank() == 0 else SystemExit(2)  # one process says it for all
    return cast(Result, outcome[0])


def say(text: str) -> None:
    """Print, from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def how_many(**questions: bool) -> dict[str, int]:
    """How many processes say yes to each question. Every process must ask."""
    answers = sum_over_ranks({name: torch.tensor(float(yes)) for name, yes in questions.items()})
    return {name: int(count) for name, count in answers.items()}


def counted_together(batches: list[Batch]) -> list[Batch]:
    """The micro-batches of a step with counts over all of them and all processes.

    On the CPU, before batches move to their device: nothing waits for a GPU.
    """
    counts = {name: torch.stack([batch.counts[name] for batch in batches]).sum() for name in batches[0].counts}
    summed = sum_over_ranks(counts)
    return [dataclasses.replace(batch, counts=summed) for batch in batches]


def whole(value: Tensor) -> Tensor:
    """A tensor as one process would hold it, whoever holds its parts. Every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard(system: nn.Module, mesh: Any) -> None:
    """FSDP2: a group for each block, and one for what is around them."""
    groups = [module for module in system.modules() if isinstance(module, Block | MultiwayBlock)] + [system]
    for group in groups:
        sharded = fully_shard(group, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _summed(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook: the sum over all processes, where its own would be the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda reduced: reduced.value()[0])
