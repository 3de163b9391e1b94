"""Tensors of a module that somebody pickled with `torch.save`, without running anything the pickle says.

    file --unpickler that admits listed names only--> tree of inert Nodes --Pickled.tensor--> the tensors asked for

A pickle is a program: it names functions and calls them. Here each name it may use is listed beforehand and stands for
a Node, which only remembers what it was called with; any other name ends the reading. Tensors are made afterwards,
straight from the file's bytes. Both formats of `torch.save` are read: zip (torch 1.6 and newer) and the one before.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from opt.config import UserError

MOST_PICKLE_BYTES = 16 * 2**20
"""The pickle of a large network's structure is far below this; its weights lie beside it."""
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""What a file of the older format begins with (torch.serialization)."""
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
}
CONTAINERS = {"collections.OrderedDict": OrderedDict, "__builtin__.set": set, "builtins.set": set}


class Node:
    """Stands where an object stood: the name of its class or maker, what that was called with, and its state.

    Its `__setstate__` is all that a pickle's BUILD ever calls, and answers it for classes too, by a TypeError.
    """

    __slots__ = ("arguments", "state")
    name: ClassVar[str]
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Node:
        node = object.__new__(cls)
        node.arguments, node.state = arguments, {}
        return node

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def child(self, name: str) -> Any:
        """A module's submodule or parameter. Raises KeyError when there is none of that name."""
        for table in ("_modules", "_parameters"):
            if name in self.state.get(table, {}):
                return self.state[table][name]
        raise KeyError(name)


@dataclass(frozen=True)
class _Storage:
    """Where numbers lie: dtype, the name of the place in the file, how many."""

    dtype: torch.dtype
    key: str
    length: int


class InertUnpickler(pickle.Unpickler):
    """Builds Nodes for `names`, plain containers and numbers; refuses everything else."""

    def __init__(self, file: IO[bytes], names: Iterable[str]) -> None:
        super().__init__(file)
        self.names = {*names, *STORAGES, PARAMETER, TENSOR}
        self.classes: dict[str, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in CONTAINERS:
            return CONTAINERS[full]
        if full not in self.names and f"{full.partition('.')[0]}.*" not in self.names:
            raise UserError(f"it names {full}, which has no place in such a file; nothing was run")
        if full not in self.classes:
            self.classes[full] = type("Named", (Node,), {"__slots__": (), "name": full})
        return self.classes[full]

    def persistent_load(self, place: Any) -> Any:
        """A storage; or, in the older format, a module's class with its source text, which nobody looks at."""
        if place[0] == "module":
            return place[1]
        _, kind, key, _, length = place[:5]
        return self.storages.setdefault(key, _Storage(STORAGES[kind.name], key, int(length)))


class Pickled:
    """A file opened: `root` is what was saved, `tensor` gives a tensor of it.

    names: the classes that may stand in the file, "module.name", or "package.*" for all of one. Raises UserError for a
    file that names anything else, or that is not from `torch.save`.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                zipped = file.read(4) == b"PK\3\4"
            self.root, self._places = _read_zip(path, names) if zipped else _read_older(path, names)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # a file may be broken in any way
            raise UserError(f"{path}: not a file of torch.save ({type(error).__name__}: {error})") from error

    @staticmethod
    def is_tensor(value: Any) -> bool:
        """Whether a value of the file stands for a tensor or parameter."""
        return isinstance(value, Node) and value.name in (PARAMETER, TENSOR)

    def tensor(self, node: Any) -> Tensor:
        """The tensor or parameter that a Node stands for. Raises ValueError for another Node or wrong sizes."""
        if isinstance(node, Node) and node.name == PARAMETER:
            node = node.arguments[0]
        if not isinstance(node, Node) or node.name != TENSOR:
            raise ValueError("expected a tensor")
        storage, offset, size, stride = node.arguments[:4]
        if not isinstance(storage, _Storage) or math.prod(size) > storage.length:
            raise ValueError(f"a tensor of {size} does not lie in its storage")
        return self._numbers(storage).as_strided(size, stride, offset).clone()

    def _numbers(self, storage: _Storage) -> Tensor:
        """A whole storage, (n,)."""
        start, size = self._places[storage.key]
        if size != storage.length * storage.dtype.itemsize:
            raise ValueError(f"{storage.length} numbers do not lie in {size} bytes")
        with self.path.open("rb") as file:
            file.seek(start)
            content = bytearray(size)
            if file.readinto(content) != size:
                raise ValueError("the file is cut short")
        return torch.frombuffer(content, dtype=storage.dtype)


def _read_zip(path: Path, names: Iterable[str]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What was saved, and where each storage lies: first byte, bytes."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        program = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        folder = program.filename.removesuffix(".pkl") + "/"
        storages = [entry for entry in archive.infolist() if entry.filename.startswith(folder)]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in (program, *storages)):
            raise UserError("it is compressed, which torch.save never does")
        if program.file_size > MOST_PICKLE_BYTES:
            raise UserError(f"its pickle has {program.file_size:,} bytes, more than {MOST_PICKLE_BYTES:,}")
        root = InertUnpickler(io.BytesIO(archive.read(program)), names).load()
        return root, {entry.filename.removeprefix(folder): (_content(file, entry), entry.file_size)
                      for entry in storages}


def _content(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where a stored entry's bytes begin: behind its header of 30 bytes, its name and its padding."""
    file.seek(entry.header_offset + 26)
    name, padding = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + padding


def _read_older(path: Path, names: Iterable[str]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same from the format before torch 1.6: five pickles, then each storage behind its length."""
    with path.open("rb") as file:
        if InertUnpickler(file, ()).load() != MAGIC_NUMBER:
            raise UserError("not a file of torch.save")
        InertUnpickler(file, ()).load()  # the format's version
        InertUnpickler(file, ()).load()  # about the machine
        reader = InertUnpickler(file, names)
        root = reader.load()
        places = {}
        for key in InertUnpickler(file, ()).load():
            (length,) = struct.unpack("<q", file.read(8))
            size = length * reader.storages[key].dtype.itemsize
            places[key] = (file.tell(), size)
            file.seek(size, io.SEEK_CUR)
        return root, places
