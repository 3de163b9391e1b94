"""Weights of the embedded networks: one safetensors file each, float16, the configuration in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from opt.files import write_atomic

FOLDER = Path(__file__).parent / "weights"


def write(path: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write a module's weights in half precision, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().to(torch.float16).contiguous() if tensor.is_floating_point() else tensor
              for name, tensor in module.state_dict().items()}
    write_atomic(path, save(halves, metadata={"config": json.dumps(config)}))


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in the file's header."""
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["config"]))


def read_into(path: Path, module: nn.Module) -> nn.Module:
    """Fill `module` from the file, in float32 and evaluation mode."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    module.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                            for name, tensor in state.items()})
    return module.eval()
