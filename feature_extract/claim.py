"""settings.json: what the bytes in a folder of shards depend on, noted before the first of them is written.

A job that would write other bytes into the same folder is refused, and told which setting differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opt.config import UserError
from opt.files import write_atomic

SETTINGS = "settings.json"


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings in the folder. Raises UserError when it was begun with others, or holds shards without any."""
    path = out / SETTINGS
    if path.exists():
        before = _settings(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{out} was begun with {_words(name, before.get(name))}, now it is {_words(name, value)}: "
                    "give what it was begun with, or choose another --out"
                )
    elif any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards without {SETTINGS}, made in another way: choose another --out")
    else:
        write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())


def _settings(path: Path) -> dict[str, Any]:
    """What `claim` wrote. Raises UserError when it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another --out, or delete this folder") from error


def _words(name: str, value: Any) -> str:
    """A setting as the user knows it."""
    if name == "rows_sha256":
        return f"a source whose rows have the SHA-256 {str(value)[:12]}"
    if isinstance(value, dict):
        value = ":".join(str(value[name]) for name in ("backend", "weights") if name in value) + (
            f" (SHA-256 {str(value['weights_sha256'])[:12]})" if "weights_sha256" in value else "")
    return f"--{name.replace('_', '-')} {value}"
