"""Places: where in a system a published encoder's weights may begin.

    system --places--> embedders of a kind, each with the stack that reads it --require_settings, fill--> begun

A tower is found by what it is made of: a module that has one embedder of that kind and one Stack as its parts. So a
system need not say where its towers are, and those of a momentum twin are found too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opt.config import UserError
from opt.nn.block import Stack
from opt.systems.system import System


@dataclass(frozen=True)
class Place:
    """An embedder and the stack that reads it, with what their names in the state dict begin with."""

    embedder_name: str
    embedder: nn.Module
    stack_name: str
    stack: Stack

    @property
    def name(self) -> str:
        """Of the module that both are parts of, with a dot behind it; empty for the system itself."""
        return self.embedder_name.rpartition(".")[0] + "." if "." in self.embedder_name else ""


def places(system: System, kind: type[nn.Module]) -> list[Place]:
    """All towers whose embedder is of this kind; the model's own first."""
    found = []
    for name, module in system.named_modules():
        prefix = f"{name}." if name else ""
        embedders = [(prefix + part, one) for part, one in module.named_children() if isinstance(one, kind)]
        stacks = [(prefix + part, one) for part, one in module.named_children() if isinstance(one, Stack)]
        if len(embedders) == len(stacks) == 1:
            found.append(Place(*embedders[0], *stacks[0]))
    return found


def require_settings(config: Any, parts: Sequence[str], theirs: Mapping[str, Any], path: Path) -> None:
    """Raises UserError that names every option to change where settings differ.

    parts: fields of `config` that settings may stand in, beside the configuration itself; what none has is not asked.
    """
    found, options = [], []
    for name, value in theirs.items():
        owner = next((f"{part}." for part in parts if hasattr(getattr(config, part, None), name)), "")
        holder = getattr(config, owner[:-1]) if owner else config
        if getattr(holder, name, value) != value:
            option = f"--model.{owner}{name}".replace("_", "-")
            found.append(f"{name} {getattr(holder, name)}")
            options.append(option if value is True else f"{option} {value}")
    if found:
        raise UserError(f"the weights in {path} do not fit a model with {', '.join(found)}; give {' '.join(options)}")


def fill(system: System, state: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Put the tensors into a new system; returns the names of its parts that now hold them.

    Raises UserError, with nothing changed, where a shape is not the system's.
    """
    ours = system.state_dict()
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{path}: what belongs to {name} has shape {tuple(tensor.shape)}, expected "
                            f"{tuple(ours[name].shape)} by the settings; copy the folder anew")
    system.load_state_dict(dict(state), strict=False)
    return tuple(dict.fromkeys(name.partition(".")[0] for name in ours if name in state))
