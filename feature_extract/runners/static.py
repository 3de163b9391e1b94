"""One share of the work items, told by the environment: no process needs to know another.

    torchrun or mpirun   RANK, WORLD_SIZE
    a SLURM job array    SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_MIN, SLURM_ARRAY_TASK_STEP, SLURM_ARRAY_TASK_COUNT
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from opt.config import UserError


class Share(NamedTuple):
    """Number `rank` of `world` shares: the work items rank, rank + world, ..."""

    rank: int
    world: int


def share(environment: Mapping[str, str]) -> Share:
    """Which share this process does. Raises UserError when the environment does not say, or says nonsense."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    elif "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", "0")
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", "1"))
        rank = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step
        world = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    else:
        raise UserError("--runner static: neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID are set; start it by "
                        "`sbatch --array=0-7`, or set RANK=0 WORLD_SIZE=8 yourself")
    if not 0 <= rank < world:
        raise UserError(f"--runner static: rank {rank} of {world}: a rank is at least 0 and below the number of ranks")
    return Share(rank, world)


def _number(environment: Mapping[str, str], name: str, otherwise: str = "") -> int:
    text = environment.get(name, otherwise)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--runner static: {name} is {text!r}, not a number") from error
