"""State dicts from the formats that checkpoints come in, without running anything that a file says.

    .safetensors | .pt, .pth, .bin (torch.save; torch.jit.save, as OpenAI's CLIP) | .index.json (a file each tensor)
    | .pkl (pickle.dump of numpy arrays, as detectron2 writes)  --read_state--> {name: tensor}

A file of torch.save is read by torch, as far as it takes nothing but tensors and plain values from it; what holds
objects of some class too, settings or whole modules, by the inert reader of pickled.py.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opt.config import UserError, read_json
from opt.weights.pickled import Node, Pickled
from opt.weights.pickled_arrays import PickledArrays

WRAPPERS = ("model", "module", "state_dict")
"""Where training programs put the weights beside an optimizer's state."""
SETTINGS = (
    "argparse.Namespace", "collections.defaultdict", "easydict.*", "enum.*", "numpy.*", "omegaconf.*", "pathlib.*",
    "pytorch_lightning.*", "ruamel.*", "typing.*", "yacs.*", "_codecs.encode", "torch.device", "torch.Size",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "unicode", "bytes", "object", "long")),
)
"""What stands beside the weights in authors' checkpoints: settings, meters, schedules. All of it stays inert."""
MODULES = ("__torch__.*", *(f"torch.jit._pickle.{name}" for name in (
    "build_tensorlist", "build_intlist", "build_doublelist", "build_boollist", "restore_type_tag")))
"""What torch.jit.save names."""
INDEX = ".index.json"


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, wrappers taken off.

    Raises UserError for a file that cannot be read, that holds anything but tensors, plain values and settings, or no
    tensors.
    """
    try:
        if path.name.endswith(INDEX):
            state = {name: one for file in shards(path) for name, one in read_state(file).items()}
        elif path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = _arrays(path) if path.suffix == ".pkl" else _saved(path)
    except UserError:
        raise
    except Exception as error:  # each format fails in its own ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} could not be read as a checkpoint: {reason}") from error
    if not state:
        raise UserError(f"{path} could not be read as a checkpoint: it holds no tensors by name")
    return state


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once. Raises UserError for an index that is none."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} names no files beside it as its weight_map; copy the folder anew")
    return [index.with_name(name) for name in names]


def _arrays(path: Path) -> dict[str, Tensor]:
    file = PickledArrays(path)
    arrays = {id(one): file.tensor(one) for one in _unwrap(file.root).values() if file.is_array(one)}
    return {name: arrays[id(one)] for name, one in _unwrap(file.root).items() if id(one) in arrays}


def _saved(path: Path) -> dict[str, Tensor]:
    """A file of torch.save, or of torch.jit.save."""
    if _is_of_jit(path):
        file = Pickled(path, MODULES)
        return dict(_module(file, file.root, ""))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message advises to run what the file holds
        file = Pickled(path, SETTINGS)
        return {name: file.tensor(one) for name, one in _unwrap(file.root).items() if file.is_tensor(one)}
    return {name: one for name, one in _unwrap(content).items() if isinstance(one, Tensor)}


def _is_of_jit(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _module(file: Pickled, node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors, and those of the modules in it."""
    for name, value in node.state.items():
        if file.is_tensor(value):
            yield prefix + name, file.tensor(value)
        elif isinstance(value, Node) and isinstance(value.state, dict):
            yield from _module(file, value, f"{prefix}{name}.")


def _unwrap(content: Any) -> dict[str, Any]:
    """`content`, or what a wrapper in it holds, "module." of a parallel module taken off its names."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        return {}
    return {str(name).removeprefix("module."): one for name, one in content.items()}
