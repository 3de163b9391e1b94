"""Training in stages: which parameters a stage moves."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from opt.config import UserError
from opt.recipe import Stage


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


def require_objectives(stage: Stage, known: tuple[str, ...]) -> None:
    """Raises UserError for an objective that the system has not."""
    if unknown := [name for name in stage.objectives if name not in known]:
        raise UserError(f"stage {stage.name!r} asks for {unknown[0]!r}; objectives are {', '.join(known)}")
