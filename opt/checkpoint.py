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
from opt.systems.system import DataFacts, System, build, load

CARD = """---
library_name: opt
tags: [{system}, image-text-audio]
---
# {system}

A `{system}` model with {parameters:,} parameters, trained by `opt pretrain`.

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
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model (no config.json); give the `model` folder of a finished run")
    content = json.loads((folder / "config.json").read_text())
    if sha256(folder / "model.safetensors") != content["sha256"]:
        raise UserError(f"{folder}/model.safetensors is not the file config.json was written for; copy the folder anew")
    kind = type(load(f"{content['system']}.base"))
    config = configuration.from_dict(kind, content["config"], f"{folder}/config.json")
    facts = configuration.from_dict(DataFacts, content["facts"], f"{folder}/config.json")
    system = build(content["system"], config, Tokenizer.load(folder), facts)
    system.load_state_dict(load_file(folder / "model.safetensors"))
    return system.to(device).eval()


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write a training state as `folder/step-N`, complete or absent, and drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    with _one_process():
        dcp.save(state, checkpoint_id=temporary, no_dist=True)
    temporary.rename(final)
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_state(folder: Path) -> Path | None:
    """The checkpoint of the highest step whose metadata exists, or None."""
    complete = [path for path in folder.glob("step-*") if (path / ".metadata").exists()]
    return max(complete, default=None)


def load_state(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` (same structure as was saved) from a checkpoint, in place."""
    with _one_process():
        dcp.load(state, checkpoint_id=path, no_dist=True)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning that PyTorch gives whoever saves from a single process, as asked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
