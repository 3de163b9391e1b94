"""A model as a folder in the layout of the hub: config.json, model.safetensors, tokenizer.json, README.md (its card).

    save_pretrained(system, folder) <-> from_pretrained(folder), read_history(folder)

config.json holds the hashes of the weights and of the tokenizer, and what the model was trained on (opt/history.py).

What a run goes on from is another thing: pretrain/state.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

import opt
from opt import config as configuration
from opt.config import UserError
from opt.data.tokenizer import FILE as TOKENIZER
from opt.data.tokenizer import Tokenizer
from opt.files import sha256, write_atomic
from opt.history import History, Stage
from opt.systems.system import DataFacts, System, build, system_type

CARD = """---
library_name: opt
tags: [{system}, image-text-audio]
---
# {system}

A model of system `{system}` with {parameters:,} parameters, made by `opt` {version}{trained}.

    from opt.checkpoint import from_pretrained
    system = from_pretrained("path/to/this/folder")

Features it reads: {extractors}
"""


def save_pretrained(
    system: System, folder: Path, weights: dict[str, Tensor] | None = None, trained: str = "", history: History = ()
) -> None:
    """Write the model for use. config.json comes last and holds the weights' hash: without it there is no model.

    weights: the state of a system whose parameters lie on several processes, gathered; else the system's own.
    trained: how, for the card. history: on what, stage by stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    state = system.state_dict() if weights is None else weights
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomic(folder / "model.safetensors", to_safetensors(kept))
    if system.reads_text:
        system.tokenizer.save(folder)
    parameters = sum(parameter.numel() for parameter in system.parameters())
    extractors = json.dumps(system.facts.extractors)
    card = CARD.format(system=system.name, parameters=parameters, extractors=extractors, trained=trained,
                       version=opt.__version__)
    write_atomic(folder / "README.md", card.encode())
    content = {
        "system": system.name,
        "version": opt.__version__,
        "sha256": sha256(folder / "model.safetensors"),
        "tokenizer_sha256": sha256(folder / TOKENIZER) if system.reads_text else None,
        "config": configuration.to_dict(system.config),
        "facts": configuration.to_dict(system.facts),
        "history": [configuration.to_dict(stage) for stage in history],
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
    tokenizer = _tokenizer(folder, content) if kind.reads_text else None
    try:
        system = build(content["system"], config, tokenizer, facts)
        system.load_state_dict(load_file(weights))
    except (ValueError, RuntimeError) as error:  # sizes that do not go together, or not with the weights
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit {weights.name} ({reason}); copy the folder anew") from error
    return system.to(device).eval()


def read_history(folder: Path | str) -> History:
    """What the model in `folder` was trained on; empty where it does not say. Raises UserError where it is damaged."""
    path, stages = Path(folder) / "config.json", _description(Path(folder)).get("history", [])
    return parse_history(stages, f"{path}, history")


def parse_history(stages: Any, where: str) -> History:
    """A history out of JSON. Raises UserError naming `where` when it is none."""
    if not isinstance(stages, list):
        raise UserError(f"{where}: expected a list of stages; copy the folder anew")
    return tuple(configuration.from_dict(Stage, stage, where) for stage in stages)


def _tokenizer(folder: Path, content: dict[str, Any]) -> Tokenizer:
    """The words that the weights were trained with. Raises UserError when others have taken their place."""
    tokenizer, path = Tokenizer.load(folder), folder / TOKENIZER
    if sha256(path) != content.get("tokenizer_sha256", sha256(path)):
        raise UserError(f"{path} is another tokenizer than the one the model was trained with (its SHA-256 differs); "
                        "copy the folder anew")
    return tokenizer


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
