"""Source: a published checkpoint as an importer reads it: settings, tensors by their publisher's names, which are used.

    folder of transformers | folder of open_clip | one file  --Source.open--> .settings, .take(name), .layer(...)

Nothing in a file is run (opt/weights/state.py). Tensors are read when the first is asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.config import UserError, read_json
from opt.files import sha256
from opt.weights.state import INDEX, read_state, shards

LAYOUTS = {
    "config.json": ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}"),
    "open_clip_config.json": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
"""Files of a folder: settings, and what the weights beside them may be called. transformers', then open_clip's."""


class Source:
    """path: the file of the weights, or their index. settings: what the folder's configuration says; {} for one file.
    folder: where it lies, as the user named it; None for one file."""

    def __init__(self, path: Path, settings: dict[str, Any], folder: Path | None) -> None:
        self.path, self.settings, self.folder = path, settings, folder
        self.used: set[str] = set()

    @classmethod
    def open(cls, place: Path) -> Source:
        """A folder or a file. Raises UserError where there is no checkpoint."""
        if place.is_file():
            return cls(place, {}, None)
        if not place.is_dir():
            raise UserError(f"{place} does not exist; expected the folder or the file of a published checkpoint")
        for configuration, names in LAYOUTS.items():
            if path := next((place / name for name in names if (place / name).is_file()), None):
                return cls(path, _settings(place / configuration), place)
        expected = ", ".join(name for names in LAYOUTS.values() for name in names)
        raise UserError(f"{place} holds no weights: expected one of {expected}; a file of another name is given itself")

    def rename(self, rename: Callable[[str], str]) -> None:
        """Give every tensor the name that `rename` makes of its own, before any is taken."""
        self.tensors = {rename(name): tensor for name, tensor in self.tensors.items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All there are, as the file holds them."""
        return read_state(self.path)

    @cached_property
    def sha256(self) -> str:
        """Of the file; of the files' hashes one behind the other, where an index names several."""
        if not self.path.name.endswith(INDEX):
            return sha256(self.path)
        return hashlib.sha256("".join(sha256(file) for file in shards(self.path)).encode()).hexdigest()

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """How transformers prepares pictures for it: the folder's preprocessor_config.json; {} where there is none."""
        return _settings(self.folder / "preprocessor_config.json") if self.folder else {}

    @property
    def unused(self) -> list[str]:
        """Names that nobody has taken, in the file's order."""
        return [name for name in self.tensors if name not in self.used]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def layers(self, stem: str) -> int:
        """How many layers there are whose names begin with `stem` and a number."""
        numbers = [int(match[1]) for name in self.tensors if (match := re.match(rf"{re.escape(stem)}(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from which settings follow; it does not count as used. Raises UserError as `take`."""
        return tuple(self._find(name).shape)

    def take(self, name: str) -> Tensor:
        """A tensor, float32 where it holds fractions. Raises UserError naming the file where there is none."""
        tensor = self._find(name)
        self.used.add(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    def layer(self, ours: str, *theirs: str) -> dict[str, Tensor]:
        """Weight and bias of one module of ours, from those of `theirs`, one below the other."""
        return {f"{ours}.{kind}": torch.cat([self.take(f"{name}.{kind}") for name in theirs])
                for kind in ("weight", "bias")}

    def fused(self, ours: str, theirs: str) -> dict[str, Tensor]:
        """Query and key_value of our attention, from query, key and value one below the other in one matrix and bias:
        `theirs` is what stands before "weight" and "bias", such as "attn.in_proj_" or "attn.qkv."."""
        state: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            query, key, value = self.take(f"{theirs}{kind}").chunk(3)
            state |= {f"{ours}.query.{kind}": query, f"{ours}.key_value.{kind}": torch.cat([key, value])}
        return state

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no {name}, which the network has; give a checkpoint of that layout, or "
                            "copy it anew")
        return self.tensors[name]


def _settings(path: Path) -> dict[str, Any]:
    """Names with values, none where there is no such file. Raises UserError for another file."""
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no names with values; copy the folder anew")
    return settings
