"""Small training runs in processes of their own: started at once from a server that has imported everything."""

import dataclasses
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from opt.recipe import LoopConfig
from opt.systems.opt import tiny
from pretrain.run import PretrainConfig, pretrain

MODEL = dataclasses.replace(
    tiny().model, width=16, layers=1, heads=2, inner=32, decoder_layers=1, alignment_width=8, dropout=0.1
)
SERVER = multiprocessing.get_context("forkserver")


def config(shards: Path, out: Path, **changes: object) -> PretrainConfig:
    """A run of twelve steps of about 500 tokens."""
    loop = LoopConfig(**{"steps": 12, "batch_tokens": 500, "workers": 0, "log_every": 2, "save_every": 4, **changes})
    return PretrainConfig("opt.tiny", (str(shards),), out, MODEL, loop=loop)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Job:
    """`work(*arguments)` in `world` processes, with torchrun's variables when there are several."""

    def __init__(self, world: int, work: Callable[..., None], *arguments: object) -> None:
        SERVER.set_forkserver_preload(["pretrain.run"])
        port = free_port()
        self.processes = [SERVER.Process(target=_process, args=(rank, world, port, work, arguments))
                          for rank in range(world)]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes of all processes; those still there after so many seconds are killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL, all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def train(config: PretrainConfig) -> None:
    """What each process of a training job does."""
    pretrain(config)


def _process(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    try:
        work(*arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
