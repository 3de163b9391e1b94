"""Numpy arrays that somebody pickled with `pickle.dump`, without running anything the pickle says.

    file --the inert reader of pickled.py--> tree of dicts and Nodes --PickledArrays.tensor--> the arrays asked for

detectron2 publishes checkpoints in this form: {"model": {name: array}, "__author__": ...}.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt.config import UserError
from opt.weights.pickled import InertUnpickler, Node

MAKERS = tuple(f"numpy.{core}.{name}" for core in ("core", "_core") for name in (
    "multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"))
EMPTY = ("__builtin__.bytes", "builtins.bytes")
NAMES = (*MAKERS, *EMPTY, "numpy.ndarray", "numpy.dtype", "_codecs.encode")
"""All that an array's pickle names, in numpy 1 and 2; in protocols 0 to 2, bytes are made by a call."""
DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"})


class PickledArrays:
    """A file opened: `root` is what was pickled, Nodes in place of arrays; `tensor` gives one of them.

    Raises UserError for a pickle that names anything but arrays.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.root = InertUnpickler(file, NAMES).load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # a file may be broken in any way
            raise UserError(f"{path}: not a pickle of arrays ({type(error).__name__}: {error})") from error

    @staticmethod
    def is_array(value: Any) -> bool:
        """Whether a value of the file stands for an array."""
        return isinstance(value, Node) and value.name.endswith(("_reconstruct", "_frombuffer"))

    @staticmethod
    def tensor(node: Any) -> torch.Tensor:
        """The array that a Node stands for. Raises ValueError for another Node, or sizes that do not fit its bytes."""
        if not PickledArrays.is_array(node):
            raise ValueError("expected an array")
        if node.name.endswith("_reconstruct"):
            _, shape, dtype, columns_first, content = node.state
            return _tensor(_bytes(content), dtype, shape, "F" if columns_first else "C")
        content, dtype, shape, order = node.arguments
        return _tensor(_bytes(content), dtype, shape, order)


def _tensor(content: bytes, dtype: Node, shape: tuple[int, ...], order: Any) -> torch.Tensor:
    """An array's bytes as a tensor. Raises ValueError when sizes or dtype are not an array's of numbers."""
    kind = dtype.arguments[0]
    if dtype.name != "numpy.dtype" or kind not in DTYPES:
        raise ValueError(f"an array of {kind}, expected numbers")
    numbers = np.dtype(kind).newbyteorder({"<": "<", ">": ">"}.get(dtype.state[1] if dtype.state else "<", "="))
    if len(content) != math.prod(shape) * numbers.itemsize:
        raise ValueError(f"an array of {tuple(shape)} does not lie in {len(content)} bytes")
    array = np.frombuffer(content, numbers).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(np.array(array, numbers.newbyteorder("="), order="C"))


def _bytes(content: Any) -> bytes:
    """An array's content: bytes, or what protocols 0 to 2 make of them."""
    if isinstance(content, Node) and content.name in EMPTY and not content.arguments:
        return b""
    if isinstance(content, Node) and content.name == "_codecs.encode" and content.arguments[1] == "latin1":
        return content.arguments[0].encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise ValueError("an array without bytes")
    return bytes(content)
