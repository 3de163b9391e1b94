"""State dicts from the formats that checkpoints come in, without running anything that a file says.

    .safetensors | .pt, .pth (torch.save) | .pkl (pickle.dump of numpy arrays, as detectron2 writes) -> {name: tensor}
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opt.config import UserError
from opt.weights.pickled_arrays import PickledArrays

WRAPPERS = ("model", "state_dict")
"""Where training programs put the weights beside an optimizer's state."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, wrappers taken off.

    Raises UserError for a file that cannot be read, that holds anything but tensors and plain values, or no tensors.
    """
    try:
        if path.suffix == ".pkl":
            file = PickledArrays(path)
            arrays = {id(one): file.tensor(one) for one in _unwrap(file.root).values() if file.is_array(one)}
            state = {name: arrays[id(one)] for name, one in _unwrap(file.root).items() if id(one) in arrays}
        else:
            state = {name: one for name, one in _unwrap(_load(path)).items() if isinstance(one, Tensor)}
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # whose message advises to run what the file holds
        raise UserError(f"{path} could not be read as a checkpoint: it holds something other than tensors") from error
    except Exception as error:  # each format fails in its own ways
        raise UserError(f"{path} could not be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not state:
        raise UserError(f"{path} could not be read as a checkpoint: it holds no tensors by name")
    return state


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any) -> dict[str, Any]:
    """`content`, or what a wrapper in it holds, "module." of a parallel module taken off its names."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        return {}
    return {str(name).removeprefix("module."): one for name, one in content.items()}
