"""Workers as actors of Ray: on the cluster that RAY_ADDRESS names, or on this machine. Work items travel, features not.

Every machine needs this package installed, and the corpus and the output under the same paths.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from feature_extract.extractors import reopen
from feature_extract.runners.local import do
from feature_extract.runners.supervise import Event
from feature_extract.work import Setup, WorkItem
from opt.config import UserError


class Actor:
    """Lives in a process of Ray: one thread works, another answers what it has said."""

    def __init__(self, setup: Setup) -> None:
        import torch

        torch.set_num_threads(1)
        self.setup, self.said, self.heard = setup, list[Event](), 0
        self.networks = functools.cache(lambda: reopen(setup.extractors, setup.device))

    def work(self, work: WorkItem) -> None:
        """Do one work item."""
        do(work, self.networks, self.setup, self.said.append)

    def hear(self, count: int) -> list[Event]:
        """All that was said but the first `count`, which are forgotten."""
        del self.said[: count - self.heard]
        self.heard = count
        return list(self.said)


class RayWorker:
    """One actor, as the supervisor sees a worker."""

    def __init__(self, setup: Setup) -> None:
        import ray

        on_gpu = setup.device.startswith("cuda")
        options = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0, "max_concurrency": 2}
        self.ray: Any = ray
        self.actor: Any = self.ray.remote(Actor).options(**options).remote(setup)
        self.heard, self.death = 0, ""
        self.asked: Any = None

    def give(self, work: WorkItem) -> None:
        """Let it begin."""
        self.actor.work.remote(work)

    def hear(self) -> list[Event]:
        """What it has said since the last answer; asks again where that answer has come."""
        if self.asked is None:
            self.asked = self.actor.hear.remote(self.heard)
        if not self.ray.wait([self.asked], timeout=0)[0]:
            return []
        try:
            events: list[Event] = self.ray.get(self.asked)
        except self.ray.exceptions.RayActorError as error:
            self.death = str(error).splitlines()[0]
            return []
        self.heard, self.asked = self.heard + len(events), None
        return events

    def ended(self) -> str:
        """How it ended without being asked to; empty while it lives."""
        return self.death

    def kill(self) -> None:
        """End it now."""
        self.ray.kill(self.actor)


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Ray, begun or joined. Raises UserError when it is not installed or cannot be reached."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--runner ray: Ray is not installed; `opt doctor` says how to get it") from error
    begun: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **begun)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--runner ray: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()
