"""Configuration: dataclasses on the command line (tyro), saved with a run, given back from the saved file.

A verb's function takes one dataclass. Unknown keys are errors, on the command line and in a file alike.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake of the user's: shown as one sentence without a traceback. Names the value, the rule and the way out."""


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as JSON-ready values (paths as strings)."""
    return {name: _plain(getattr(config, name)) for name in (field.name for field in dataclasses.fields(config))}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def from_dict(kind: type[Config], values: dict[str, Any], where: str = "configuration") -> Config:
    """The dataclass `kind` from `to_dict`'s form. Raises UserError for a key that `kind` does not have."""
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {kind.__name__} knows {', '.join(sorted(known))}")
    return kind(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(kind for kind in arguments if kind is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value, where)
    if hint is Path:
        return Path(value)
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_typed(kind, entry, where) for kind, entry in zip(kinds, value, strict=True))
    return value


def save(config: Any, path: Path) -> None:
    """Write the resolved configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(kind: type[Config], path: Path) -> Config:
    """Read what `save` wrote. Raises UserError when the file is missing or holds an unknown key."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a configuration saved by an earlier run")
    return from_dict(kind, json.loads(path.read_text()), str(path))
