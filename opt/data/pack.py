"""Packer: collects inputs, sequences and writings of a batch sample by sample, then lays them end to end.

    text = packer.text(ids)                     entries of the text table, as a Part
    hidden = packer.hide_regions(part, [2, 5])  the same part with two entries replaced by masked ones
    start = packer.sequence("encoder", [text, hidden])
    packer.write("text", ids, labels, context)  a decoder's targets beside the sequence it looks at
    batch = packer.batch(keys)

Runs in loader workers on numpy arrays; the result holds tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opt.data.batch import Batch, FrameTable, PatchTable, RegionTable, Targets, TextTable, View, Writing
from opt.data.layout import cross_layout, ranges, self_layout
from opt.data.pixels import Patches
from opt.data.record import Picture

TABLES = TEXT, REGION, FRAME, PATCH = range(4)
MODALITY = {TEXT: "text", PATCH: "image", FRAME: "audio"}
"""What an entry of a table is called."""


@dataclass(frozen=True)
class Part:
    """Entries of one table in order: `table` says which, `entries` (n,) int64 where."""

    table: int
    entries: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Place:
    """One packed sequence: its number in the view, where it starts among the flat tokens, and its length."""

    number: int
    start: int
    length: int


class _Column:
    """Arrays appended piece by piece, joined once."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.starts: list[int] = []
        self.length = 0

    def append(self, piece: np.ndarray) -> np.ndarray:
        entries = np.arange(self.length, self.length + len(piece))
        self.pieces.append(piece)
        self.starts.append(self.length)
        self.length += len(piece)
        return entries

    def append_again(self, entries: np.ndarray) -> None:
        """What stands at `entries`, once more."""
        piece = np.searchsorted(self.starts, entries, "right") - 1
        rows = [self.pieces[number][entry - self.starts[number]] for number, entry in zip(piece, entries, strict=True)]
        if rows:
            self.append(np.stack(rows))

    def join(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.concatenate(self.pieces).astype(dtype, copy=False) if self.pieces else np.zeros(shape, dtype)


class Packer:
    """Collects one batch. Feature widths are those of the tables; an absent modality leaves its table empty.

    patch_width: values of a patch of pixels. firsts: tables that begin with an entry that is learned, as the class
    token of a vision transformer. views: views and the tables that each is made of, also where no sequence comes;
    others are made of all tables.
    """

    def __init__(
        self, region_width: int, speech_width: int, patch_width: int = 3, firsts: Sequence[int] = (),
        views: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.region_width, self.speech_width, self.patch_width = region_width, speech_width, patch_width
        self.firsts, self.views = tuple(firsts), dict(views or {})
        self._columns: dict[str, _Column] = defaultdict(_Column)
        self._sequences: dict[str, list[tuple[Place, list[Part]]]] = defaultdict(list)
        self._flat: dict[str, int] = defaultdict(int)
        self._writings: dict[str, list[tuple[np.ndarray, np.ndarray, Place]]] = defaultdict(list)

    def text(self, ids: np.ndarray) -> Part:
        """Token ids (L,), the first at position 0."""
        self._columns["text.positions"].append(np.arange(len(ids)))
        return Part(TEXT, self._columns["text.ids"].append(ids))

    def regions(self, picture: Picture) -> Part:
        """All regions of a picture, in stored order."""
        assert picture.regions is not None and picture.boxes is not None
        self._columns["regions.boxes"].append(picture.boxes)
        self._columns["regions.masked"].append(np.zeros(len(picture.regions), bool))
        return Part(REGION, self._columns["regions.features"].append(picture.regions))

    def frames(self, speech: np.ndarray) -> Part:
        """All frames of a recording (T, D), the first at position 0."""
        self._columns["frames.positions"].append(np.arange(len(speech)))
        self._columns["frames.masked"].append(np.zeros(len(speech), bool))
        return Part(FRAME, self._columns["frames.features"].append(speech))

    def patches(self, patches: Patches) -> Part:
        """All patches of a picture, row by row. Every picture of a batch has as many `places` to a patch."""
        self._columns["patches.places"].append(patches.places)
        self._columns["patches.shares"].append(patches.shares)
        self._columns["patches.masked"].append(np.zeros(len(patches.pixels), bool))
        return Part(PATCH, self._columns["patches.pixels"].append(patches.pixels))

    def first(self, table: int) -> Part:
        """The learned first entry of a table."""
        assert table in self.firsts
        return Part(table, np.array([-1]))

    def replace_text(self, part: Part, where: np.ndarray, ids: np.ndarray) -> Part:
        """The part with other words at `where`; their positions stay."""
        self._columns["text.positions"].append(where)
        return self._replaced(part, where, self._columns["text.ids"].append(ids))

    def hide_regions(self, part: Part, where: np.ndarray, boxes: np.ndarray) -> Part:
        """The part with the features at `where` hidden; `boxes` (R, 4) of the whole picture stay visible."""
        self._columns["regions.boxes"].append(boxes[where])
        self._columns["regions.masked"].append(np.ones(len(where), bool))
        hidden = np.zeros((len(where), self.region_width), np.float16)
        return self._replaced(part, where, self._columns["regions.features"].append(hidden))

    def hide_frames(self, part: Part, where: np.ndarray) -> Part:
        """The part with the features at `where` hidden; their positions stay."""
        self._columns["frames.positions"].append(where)
        self._columns["frames.masked"].append(np.ones(len(where), bool))
        hidden = np.zeros((len(where), self.speech_width), np.float16)
        return self._replaced(part, where, self._columns["frames.features"].append(hidden))

    def hide_patches(self, part: Part, where: np.ndarray) -> Part:
        """The part with the pixels at `where` hidden; their positions stay."""
        for name in ("patches.places", "patches.shares"):
            self._columns[name].append_again(part.entries[where])
        self._columns["patches.masked"].append(np.ones(len(where), bool))
        hidden = np.zeros((len(where), self.patch_width), np.uint8)
        return self._replaced(part, where, self._columns["patches.pixels"].append(hidden))

    @staticmethod
    def _replaced(part: Part, where: np.ndarray, entries: np.ndarray) -> Part:
        changed = part.entries.copy()
        changed[where] = entries
        return Part(part.table, changed)

    def sequence(self, view: str, parts: Sequence[Part]) -> Place:
        """One sequence of a view out of parts, in order."""
        length = sum(len(part) for part in parts)
        place = Place(len(self._sequences[view]), self._flat[view], length)
        self._sequences[view].append((place, list(parts)))
        self._flat[view] += length
        return place

    def write(self, name: str, ids: np.ndarray, labels: np.ndarray, context: Place) -> None:
        """A decoder's targets: `ids` (L,) stand before each place, `labels` (L,) at it, looking at `context`."""
        self._writings[name].append((ids, labels, context))

    def batch(self, keys: list[str], targets: dict[str, Targets], extra: dict[str, Tensor], counts: dict[str, int],
              writings: Sequence[str] = (), host: dict[str, np.ndarray] | None = None) -> Batch:
        """Everything packed. `writings` names the decoders, so that one without rows still gets an empty entry; each
        has a count of its own name, the tokens to write."""
        column = self._columns
        text = TextTable(
            torch.from_numpy(column["text.ids"].join((0,), np.int64)),
            torch.from_numpy(column["text.positions"].join((0,), np.int64)),
        )
        regions = RegionTable(
            torch.from_numpy(column["regions.features"].join((0, self.region_width), np.float16)),
            torch.from_numpy(column["regions.boxes"].join((0, 4), np.float32)),
            torch.from_numpy(column["regions.masked"].join((0,), bool)),
        )
        frames = FrameTable(
            torch.from_numpy(column["frames.features"].join((0, self.speech_width), np.float16)),
            torch.from_numpy(column["frames.positions"].join((0,), np.int64)),
            torch.from_numpy(column["frames.masked"].join((0,), bool)),
        )
        patches = PatchTable(
            torch.from_numpy(column["patches.pixels"].join((0, self.patch_width), np.uint8)),
            torch.from_numpy(column["patches.places"].join((0, 1), np.int64)),
            torch.from_numpy(column["patches.shares"].join((0, 1), np.float32)),
            torch.from_numpy(column["patches.masked"].join((0,), bool)),
        )
        written = {name: self._writing(name) for name in writings}
        tokens = sum(self._flat.values()) + sum(len(writing.ids) for writing in written.values())
        counts = {**counts, **{name: len(writing.ids) for name, writing in written.items()}}
        return Batch(
            keys=keys, tokens=tokens, text=text, regions=regions, frames=frames, patches=patches,
            views={view: self._view(view) for view in dict.fromkeys([*self.views, *self._sequences])},
            writings=written, targets=targets, extra=extra, host=host or {},
            counts={name: torch.tensor(float(count)) for name, count in counts.items()},
        )

    def _view(self, view: str) -> View:
        offsets, sequences = self._offsets(self.views.get(view, TABLES)), self._sequences[view]
        entries = [part.entries + offsets[part.table] for _, parts in sequences for part in parts]
        lengths = np.array([place.length for place, _ in sequences], np.int64)
        first = np.array([place.start for place, _ in sequences], np.int64)
        gather = np.concatenate([np.zeros(0, np.int64), *entries])
        tables = np.repeat(np.array([part.table for _, parts in sequences for part in parts], np.int8),
                           np.array([len(each) for each in entries], np.int64))
        return View(torch.from_numpy(gather), torch.from_numpy(first), self_layout(lengths), lengths, tables)

    def _offsets(self, tables: Sequence[int]) -> dict[int, int]:
        """Where entry 0 of each table lies when these tables lie end to end, learned first entries before their own."""
        columns = {TEXT: "text.ids", REGION: "regions.boxes", FRAME: "frames.features", PATCH: "patches.pixels"}
        offsets, end = {}, 0
        for table in tables:
            offsets[table] = end + (table in self.firsts)
            end = offsets[table] + self._columns[columns[table]].length
        return offsets

    def _writing(self, name: str) -> Writing:
        rows = self._writings[name]
        empty = [np.zeros(0, np.int64)]
        lengths = np.array([len(ids) for ids, _, _ in rows], np.int64)
        starts = np.cumsum(lengths) - lengths
        # What nobody looks at needs no keys and values; what two look at is there twice, as attention reads it.
        seen_starts = np.array([context.start for _, _, context in rows], np.int64)
        seen_lengths = np.array([context.length for _, _, context in rows], np.int64)
        return Writing(
            ids=torch.from_numpy(np.concatenate(empty + [ids for ids, _, _ in rows])),
            positions=torch.from_numpy(np.concatenate(empty + [np.arange(length) for length in lengths])),
            label=torch.from_numpy(np.concatenate(empty + [labels for _, labels, _ in rows])),
            layout=self_layout(lengths),
            seen=torch.from_numpy(ranges(seen_starts, seen_lengths)),
            context=cross_layout(starts, lengths, np.cumsum(seen_lengths) - seen_lengths, seen_lengths),
        )
