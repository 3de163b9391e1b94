"""Training in stages: which parameters a stage moves, and whether it asks what can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from opt.config import UserError
from opt.recipe import Stage


@dataclass(frozen=True)
class Needs:
    """What an objective must be shown to learn anything: these modalities, and so many."""

    modalities: tuple[str, ...] = ()
    least: int = 1

    def met(self, shown: Sequence[str]) -> bool:
        """Whether these modalities are enough."""
        return len(shown) >= self.least and set(self.modalities) <= set(shown)


def train_only(system: nn.Module, stage: Stage) -> None:
    """Parameters that the stage does not name get no gradient from here on; what is frozen already stays so.

    Raises UserError for a pattern that no parameter has.
    """
    names = [name for name, parameter in system.named_parameters() if parameter.requires_grad]
    for pattern in stage.trains:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"stage {stage.name!r} trains {pattern!r}, which no parameter is called; there are "
                            f"{', '.join(sorted({name.partition('.')[0] for name in names}))} and what is in them")
    for name, parameter in system.named_parameters():
        if not any(fnmatchcase(name, pattern) for pattern in stage.trains):
            parameter.requires_grad_(False)


def require_stage(stage: Stage, objectives: Mapping[str, Needs], reads: Sequence[str]) -> None:
    """Raises UserError for a stage that shows, asks or moves nothing, or asks what what it shows cannot teach.

    objectives: those that the system has. reads: its modalities.
    """
    if unknown := [name for name in stage.objectives if name not in objectives]:
        raise UserError(f"stage {stage.name!r} asks for {unknown[0]!r}; objectives are {', '.join(objectives)}")
    if strange := [name for name in stage.data if name not in ("text", "image", "audio")]:
        raise UserError(f"stage {stage.name!r} shows {strange[0]!r}; there are text, image and audio")
    shown = [name for name in reads if name in stage.data]
    idle = [name for name, needs in objectives.items() if not needs.met(shown)]
    wanted = [name for name in stage.objectives if name in idle]
    if wanted or len(idle) == len(objectives):
        raise UserError(f"stage {stage.name!r} shows {' and '.join(shown) or 'nothing'} of {', '.join(reads)}, from "
                        f"which {(wanted or idle)[0]!r} learns nothing; name other data or objectives")
    if not stage.trains:
        raise UserError(f"stage {stage.name!r} trains nothing; name patterns of parameters, or * for all")
