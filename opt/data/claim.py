"""settings.json: what the bytes in a folder of shards depend on, noted before the first of them is written.

A job that would write other bytes into the same folder is refused, and told which settings differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opt.config import UserError, read_json
from opt.files import write_atomic

SETTINGS = "settings.json"


Words = Callable[[str, Any], str]
"""A setting's name and value as the user knows them."""


def claim(out: Path, settings: dict[str, Any], words: Words = "{} {}".format) -> None:
    """Note the settings in the folder, if `check_claim` lets them in."""
    check_claim(out, settings, words)
    if not (out / SETTINGS).exists():
        write_atomic(out / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def check_claim(out: Path, settings: dict[str, Any], words: Words = "{} {}".format) -> None:
    """Raises UserError when the folder was begun with other settings, or holds shards without any."""
    path = out / SETTINGS
    if not path.exists():
        if any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards without {SETTINGS}, made in another way: choose another folder")
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged: choose another folder, or delete this one")
    differ = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
    if differ:
        then, now = (", ".join(words(name, values.get(name)) for name in differ) for values in (before, settings))
        raise UserError(f"{out} was begun with {then}; now it is {now}: give what it was begun with, or choose another "
                        "folder")
