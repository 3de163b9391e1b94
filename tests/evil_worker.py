"""Processes of extraction jobs for tests: a job as a whole, and a worker in which two of the rows do what files can do.

They are modules of their own because a process imports what it is to run.
"""

import os
import signal
import sys
import time

from feature_extract import work
from feature_extract.job import extract
from feature_extract.runners import local
from opt.config import RunAgain

HANGS, CRASHES = "p3", "p5"


def run_worker(setup, number, ours) -> None:
    """A worker whose reading never ends at one key, and which dies at another."""
    read = work.read_media

    def read_media(item, *given):
        if item.key == HANGS:
            time.sleep(3600)
        if item.key == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(item, *given)

    work.read_media = read_media
    local.work_until_killed(setup, number, ours)


def run_job(config) -> None:
    """The job; exit status 75 when it was stopped in good order."""
    try:
        extract(config)
    except RunAgain:
        sys.exit(os.EX_TEMPFAIL)


def run_rank(rank: int, world: int, config) -> None:
    """One share of a static job."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    extract(config)


def end_at_once(setup, ours) -> None:
    """What weighs rows, and dies of one."""
    os.kill(os.getpid(), signal.SIGSEGV)
