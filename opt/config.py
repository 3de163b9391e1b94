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

from opt.files import write_atomic

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake of the user's: shown as one sentence without a traceback. Names the value, the rule and the way out."""


class RunAgain(Exception):
    """Stopped as asked, in good order, before the end: the same command goes on. The message says how far it came."""


def extra(name: str) -> str:
    """The command that installs an optional part."""
    return f'pip install -c constraints.txt -e ".[{name}]"'


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


def from_dict(kind: type[Config], values: Any, where: str = "configuration") -> Config:
    """The dataclass `kind` from `to_dict`'s form.

    Raises UserError for a key that `kind` does not have, one that is missing, a value of another type or out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected names with values, found {_short(values)}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {kind.__name__} knows {', '.join(sorted(fields))}")
    if missing := [name for name, field in fields.items() if name not in values and _is_required(field)]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    typed = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**typed)
    except UserError as error:  # the class refuses a value
        raise UserError(f"{where}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, where: str) -> Any:
    """JSON's `value` as what `hint` says. Raises UserError when it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(kind for kind in arguments if kind is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_typed(kind, entry, where) for kind, entry in zip(kinds, value, strict=True))
    elif origin is typing.Literal and value in arguments or not _is_wrong(origin or hint, value):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {_short(value)}")


def _is_wrong(kind: Any, value: Any) -> bool:
    """Whether `value` is not what JSON makes of a `kind`: one of the types that JSON has, or anything else."""
    if kind is float:
        return isinstance(value, bool) or not isinstance(value, int | float)
    if kind is int:
        return isinstance(value, bool) or not isinstance(value, int)
    return kind in (Path, str, bool, dict, tuple) and not isinstance(value, kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def save(config: Any, path: Path) -> None:
    """Write the resolved configuration as JSON, complete or not at all."""
    write_atomic(path, (json.dumps(to_dict(config), indent=2) + "\n").encode())


def load(kind: type[Config], path: Path) -> Config:
    """Read what `save` wrote. Raises UserError when the file is missing, damaged, or holds an unknown key."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a configuration saved by an earlier run")
    return from_dict(kind, read_json(path), str(path))


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad JSON, or bad UTF-8
        raise UserError(f"{path} is damaged, it is not JSON ({error}); delete it or put back a whole one") from error
