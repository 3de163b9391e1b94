"""Checkpoints: a model to use (`save_pretrained`, `from_pretrained`), and a training state to go on from.

    model/            config.json, model.safetensors, tokenizer.json, README.md: what evaluation and users load
    checkpoints/      step-00000200/: PyTorch's distributed checkpoint, complete or absent

A training state is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

import opt
from opt import config as configuration
from opt.config import UserError
from opt.data.tokenizer import Tokenizer
from opt.files import sha256, sync_folder, write_atomic
from opt.systems.system import DataFacts, System, build, system_type

HASHES = "sha256.json"
"""In a training state: the SHA-256 of each of its files."""

CARD = """---
library_name: opt
tags: [{system}, image-text-audio]
---
# {system}

A `{system}` model with {parameters:,} parameters, trained by `opt`.

    from opt.checkpoint import from_pretrained
    system = from_pretrained("path/to/this/folder")

Features it reads: {extractors}
"""


def save_pretrained(system: System, folder: Path) -> None:
    """Write the model for use. config.json comes last and holds the weights' hash: without it there is no model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in system.state_dict().items()}
    write_atomic(folder / "model.safetensors", to_safetensors(weights))
    if system.reads_text:
        system.tokenizer.save(folder)
    parameters = sum(parameter.numel() for parameter in system.parameters())
    extractors = json.dumps(system.facts.extractors)
    card = CARD.format(system=system.name, parameters=parameters, extractors=extractors)
    write_atomic(folder / "README.md", card.encode())
    content = {
        "system": system.name,
        "version": opt.__version__,
        "sha256": sha256(folder / "model.safetensors"),
        "config": configuration.to_dict(system.config),
        "facts": configuration.to_dict(system.facts),
    }
    write_atomic(folder / "config.json", json.dumps(content, indent=2).encode())


def from_pretrained(folder: Path | str, device: torch.device | str = "cpu") -> System:
    """The model that `save_pretrained` wrote, in evaluation mode. Raises UserError when something is missing."""
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    content = _description(folder)
    if not weights.exists() or sha256(weights) != content["sha256"]:
        raise UserError(f"{weights} is not the file config.json was written for; copy the folder anew")
    kind = system_type(content["system"])
    config: Any = configuration.from_dict(kind.config_type, content["config"], f"{path}, config")
    facts = configuration.from_dict(DataFacts, content["facts"], f"{path}, facts")
    tokenizer = Tokenizer.load(folder) if kind.reads_text else None
    try:
        system = build(content["system"], config, tokenizer, facts)
        system.load_state_dict(load_file(weights))
    except (ValueError, RuntimeError) as error:  # sizes that do not go together, or not with the weights
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit {weights.name} ({reason}); copy the folder anew") from error
    return system.to(device).eval()


def _description(folder: Path) -> dict[str, Any]:
    """What config.json says of the model. Raises UserError that points to the model when this is a run's folder."""
    path, inner = folder / "config.json", folder / "model"
    content = configuration.read_json(path) if path.exists() else None
    if isinstance(content, dict) and {"system", "sha256", "config", "facts"} <= set(content):
        return content
    if (inner / "config.json").exists():
        raise UserError(f"{folder} is the folder of a run; give {inner}")
    wrong = "no config.json" if content is None else "its config.json describes none"
    raise UserError(f"{folder} holds no model ({wrong}); give the `model` folder of a finished run")


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write a training state as `folder/step-N`, complete or absent, and drop all but the newest `keep`.

    Raises OSError, with nothing left behind, when the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _without_advice():
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_atomic(temporary / HASHES, json.dumps(hashes, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (refused := _os_error(error)) is not None:
            raise refused from error
        raise
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_state(folder: Path) -> Path | None:
    """The checkpoint of the highest step whose metadata exists, or None."""
    complete = [path for path in folder.glob("step-*") if (path / ".metadata").exists()]
    return max(complete, default=None)


def load_state(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` (same structure as was saved) from a checkpoint, in place. Raises UserError when it is damaged."""
    if (path / HASHES).exists():  # a state saved before there were hashes has none
        for name, expected in configuration.read_json(path / HASHES).items():
            if not (path / name).exists() or sha256(path / name) != expected:
                older = max((other for other in path.parent.glob("step-*") if other < path), default=None)
                raise UserError(
                    f"{path} is damaged ({name} is not as it was written); delete that folder and run the same command "
                    f"again to go on from {older.name if older else 'the beginning'}"
                )
    with _without_advice():
        dcp.load(state, checkpoint_id=path, no_dist=True)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without PyTorch's remark that a single process saves or loads, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _os_error(error: BaseException | None) -> OSError | None:
    """What the file system said, where PyTorch's writer hides it behind errors of its own."""
    while error is not None and not isinstance(error, OSError):
        failures = list(error.failures.values()) if isinstance(error, dcp.CheckpointException) else []
        error = failures[0][0] if failures else error.__context__
    return error
