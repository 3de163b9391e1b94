"""Batch: what a preparer hands to a system. Flat tables of inputs, and views that say which entries form sequences.

    text, regions, frames, patches   flat tables: every distinct input entry once, whoever uses it
    views[name]             sequences: `gather` picks entries of the view's tables, `layout` says where they begin
    writings[name]          what a decoder writes, and which sequence of a view it looks at
    targets[name]           where a loss looks: positions in a view's flat tokens, and what should stand there
    counts[name]            how many targets a term has; the trainer sums them over ranks and micro-batches

A region masked in one sequence and whole in another stands in the table twice; everything else stands there once.
Shape legend: N tokens of a view, S sequences, M targets, P patches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from opt.data.layout import AttentionLayout


@dataclass(frozen=True)
class TextTable:
    """ids (Nt,) int64; positions (Nt,) int64, counted from 0 at [CLS]."""

    ids: Tensor
    positions: Tensor


@dataclass(frozen=True)
class RegionTable:
    """features (R, D) float16, as stored; boxes (R, 4) float32 x1 y1 x2 y2 in [0, 1]; masked (R,) bool, True = feature
    hidden."""

    features: Tensor
    boxes: Tensor
    masked: Tensor


@dataclass(frozen=True)
class FrameTable:
    """features (T, D) float16, as stored; positions (T,) int64 from 0; masked (T,) bool, True = feature hidden."""

    features: Tensor
    positions: Tensor
    masked: Tensor


@dataclass(frozen=True)
class PatchTable:
    """pixels (P, 3 p p) uint8: patches of p x p pixels, a picture's row by row; places (P, K) int64 and shares (P, K)
    float32: the position of a patch is the sum of K rows of a table of positions, each times its share; masked (P,)
    bool, True = pixels hidden."""

    pixels: Tensor
    places: Tensor
    shares: Tensor
    masked: Tensor


@dataclass(frozen=True)
class View:
    """Sequences over tables. gather (N,) int64 into [text; regions; frames], or into the one table of the view; first
    (S,) int64: each one's [CLS]; lengths (S,) int64 on the host, filler left out; tables (N,) int8 on the host: the
    table of each token (opt.data.pack), by which experts take turns."""

    gather: Tensor
    first: Tensor
    layout: AttentionLayout
    lengths: np.ndarray
    tables: np.ndarray


@dataclass(frozen=True)
class Writing:
    """What a decoder writes, packed. ids (N,) int64: the token before each place; positions (N,); label (N,): the token
    that should stand there; layout: its causal self-attention.

    seen (M,) int64: the flat tokens of a view that are looked at, each once; context: cross-attention onto those.
    """

    ids: Tensor
    positions: Tensor
    label: Tensor
    layout: AttentionLayout
    seen: Tensor
    context: AttentionLayout


@dataclass(frozen=True)
class Targets:
    """index (M,) int64 into a view's flat tokens; label: what should stand there, (M,) or (M, ...)."""

    index: Tensor
    label: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `keys` names its rows for error reports; `tokens` is the number of real tokens in all views;
    `host` stays where it is: what a system must know without waiting for the device. `parts`: batches of one modality
    each, where a system encodes these by themselves."""

    keys: list[str]
    tokens: int
    text: TextTable
    regions: RegionTable
    frames: FrameTable
    patches: PatchTable
    views: dict[str, View]
    writings: dict[str, Writing] = field(default_factory=dict)
    targets: dict[str, Targets] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)
    parts: dict[str, Batch] = field(default_factory=dict)

    @property
    def padded(self) -> int:
        """Tokens computed for the `tokens` real ones, padding and filler included."""
        if self.parts:
            return sum(part.padded for part in self.parts.values())
        layouts = [view.layout for view in self.views.values()] + [each.layout for each in self.writings.values()]
        return sum(layout.padded for layout in layouts) if layouts else self.tokens

    def table(self, modality: str) -> TextTable | PatchTable | FrameTable:
        """What a tower of that modality reads: words, patches or frames."""
        tables: dict[str, TextTable | PatchTable | FrameTable]
        tables = {"text": self.text, "image": self.patches, "audio": self.frames}
        return tables[modality]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`. Tensors that share a storage, as a loader's do, move as one."""
        return moved(self, device)


Value = TypeVar("Value")


def moved(value: Value, device: torch.device | str) -> Value:
    """The same dataclass with every tensor in it on `device`."""
    return _apply(value, _Mover(torch.device(device)))


class _Mover:
    """Moves each storage once, and finds every tensor's place in it again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moved: dict[int, UntypedStorage] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self.moved:
            content = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.moved[storage._cdata] = content.to(self.device, non_blocking=True).untyped_storage()
        place = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return place.set_(self.moved[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())


def _apply(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _apply(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {key: _apply(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_apply(entry, change) for entry in value)
    return value
