"""What attention adds to its scores, by how a query and a key lie to each other, over packed sequences.

    tokens of a bucket's sequences --places--> pairs of places --row of a table--> (b, H, L, L) a layer

    relative positions   a learned number a head and a layer (VLMo, arXiv 2111.02358; BEiT, arXiv 2106.08254)
    prefix               -inf where a token must not look: pictures see pictures, text its picture and its own past
                         (BEiT-3, arXiv 2208.10442)

Shape legend: N packed tokens, b sequences of a bucket, u unlike ones, L their padded length, H heads, P places, M
modalities, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.batch import View
from opt.data.layout import AttentionLayout, Bucket
from opt.data.pack import MODALITY

Bias = Callable[[int], list[Tensor]]
"""By the number of a layer, what is added to the scores of each bucket, -inf at its padding."""


class RelativePositions(nn.Module):
    """A learned bias for each head and layer (VLMo's code, section 5.1 of our notes).

    Two patches have a row of the table by how many rows and columns they are apart, two words, or two frames, by their
    distance; a modality's first token three of its own; tokens of different modalities one for each pair. The table
    lies in pieces, one a modality and one "across": a stage of training may teach words their order and leave what
    pictures know as it is. text, frames: how many places they have; frames 0: nothing is heard.
    """

    pair: Tensor

    def __init__(self, grid: int, text: int, frames: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads, self.starts = heads, {"text": 0, "image": text, "audio": text + 1 + grid**2}
        pair, rows = _pairs(grid, text, frames)
        self.register_buffer("pair", pair, persistent=False)
        self.pieces = tuple(rows)  # in the order of their rows, which a ParameterDict does not keep
        self.table = nn.ParameterDict({name: torch.zeros(count, layers * heads) for name, count in rows.items()})

    def forward(self, view: View) -> Bias:
        """Of the sequences of a view, whose parts lie whole in them, one of each modality. What sequences of the same
        parts have in common is looked up once."""
        pairs = [self._pairs_of(view, bucket) for bucket in view.layout.buckets]
        table_XR = torch.cat([self.table[name] for name in self.pieces]).T

        def bias(layer: int) -> list[Tensor]:
            # along the rows of a head: on CPUs many times as fast as rows of few heads, forward and backward; and in
            # the precision of attention, before it is spread over sequences
            table_HR = table_XR[layer * self.heads : (layer + 1) * self.heads].to(_precision(table_XR)).contiguous()
            biases = []
            for pair_uLL, real_uL, alike_b in pairs:
                found_uHLL = table_HR.index_select(1, pair_uLL.flatten()).unflatten(1, pair_uLL.shape).transpose(0, 1)
                if real_uL is not None:
                    found_uHLL = found_uHLL.masked_fill(~real_uL[:, None, None, :], float("-inf"))
                biases.append(found_uHLL if alike_b is None else found_uHLL.index_select(0, alike_b))
            return biases

        return bias

    def _pairs_of(self, view: View, bucket: Bucket) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the unlike sequences of a bucket the rows of the table (u, L, L), and which places are no padding (u, L),
        None where all are none; and which of them each sequence is (b,), None where there is one or all are unlike."""
        first_u, alike_b = unlike(view, bucket)
        place_uL = np.zeros((max(len(first_u), 1), bucket.queries), np.int64)
        real_uL = np.full(place_uL.shape, not len(first_u))
        starts = np.cumsum(view.lengths) - view.lengths
        for row, one in enumerate(first_u):
            length = view.lengths[one]
            place_uL[row, :length] = self._places(view.tables[starts[one] : starts[one] + length])
            real_uL[row, :length] = True
        place, real, alike = (torch.from_numpy(each).to(self.pair.device) for each in (place_uL, real_uL, alike_b))
        each_its_own = len(place) == 1 or np.array_equal(alike_b, np.arange(len(place)))
        return (self.pair[place[:, :, None], place[:, None, :]], None if real_uL.all() else real,
                None if each_its_own else alike)

    def _places(self, table_L: np.ndarray) -> np.ndarray:
        """Where each token of a sequence stands within its part, counted from `starts` of its modality: (L,)."""
        place_L = np.zeros(len(table_L), np.int64)
        for table, name in MODALITY.items():
            own = table_L == table
            place_L[own] = self.starts[name] + np.arange(own.sum())
        return place_L


def _pairs(grid: int, text: int, frames: int) -> tuple[Tensor, dict[str, int]]:
    """Row of the whole table for each query's and key's place (P, P) int64, and how many rows each piece has."""
    square = (2 * grid - 1) ** 2
    patch = torch.arange(grid**2)
    apart = (patch[:, None] // grid - patch // grid + grid - 1) * (2 * grid - 1) + (
        patch[:, None] % grid - patch % grid + grid - 1)
    blocks = {"text": _behind_first(_distances(text - 1), 2 * text - 3), "image": _behind_first(apart, square)}
    sizes = {"image": square + 3, "text": 2 * text}
    if frames:
        blocks["audio"], sizes["audio"] = _behind_first(_distances(frames), 2 * frames - 1), 2 * frames + 2
    sizes["across"] = len(blocks) * (len(blocks) - 1)
    first = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    pair = torch.block_diag(*(block + first[name] for name, block in blocks.items()))
    ends = itertools.accumulate(len(block) for block in blocks.values())
    spans = [slice(end - len(block), end) for end, block in zip(ends, blocks.values(), strict=True)]
    for row, (one, other) in enumerate(itertools.permutations(spans, 2), first["across"]):
        pair[one, other] = row
    return pair, sizes


def _distances(length: int) -> Tensor:
    place = torch.arange(length)
    return place[:, None] - place + length - 1


def _behind_first(rows: Tensor, count: int) -> Tensor:
    """Rows of the tokens behind a first one, whose three stand behind their `count`: as a query, as a key, as both."""
    pair = F.pad(rows, (1, 0, 1, 0), value=count)
    pair[1:, 0], pair[0, 0] = count + 1, count + 2
    return pair


def _precision(tensor: Tensor) -> torch.dtype:
    """In which attention will be computed."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def unlike(view: View, bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of sequences of a bucket that have other parts than all before them (u,), and which of these each member
    is like (b,). Filler is taken for like the first, and has none where there is nothing else."""
    real_b = bucket.members < len(view.lengths)
    members, alike_b = bucket.members[real_b], np.zeros(bucket.rows, np.int64)
    if not len(members):
        return members, alike_b
    starts, tables = np.cumsum(view.lengths) - view.lengths, view.tables[: int(view.lengths.sum())]
    parts_SM = np.stack([np.add.reduceat(tables == table, starts) for table in MODALITY], axis=1)
    _, first, alike = np.unique(parts_SM[members], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come: where all are unlike, each is its own
    alike_b[real_b] = np.argsort(order)[alike.reshape(-1)]
    return members[first[order]], alike_b


def prefix(writes_N: Tensor, layout: AttentionLayout) -> Bias:
    """Tokens that are written, which end their sequences, see all before them and themselves; others see only others.

    writes_N bool: whether a token is written. A number for all heads and layers: 0 or -inf.
    """
    biases = []
    for bucket, writes_bL in zip(layout.buckets, dense(writes_N, layout), strict=True):
        length = writes_bL.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=writes_bL.device).tril()
        open_bLL = ~writes_bL[:, None, :] | (writes_bL[:, :, None] & earlier)
        if bucket.valid is not None:
            open_bLL &= bucket.valid[:, None, :]
        closed_bLL = torch.where(open_bLL, 0.0, float("-inf"))
        biases.append(closed_bLL[:, None])
    return lambda layer: biases


def dense(value_N: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """What tokens have, (b, L) for each bucket of a self-attention; padding repeats a token of its sequence."""
    assert layout.key is None
    pieces = value_N[layout.query].split([bucket.rows * bucket.queries for bucket in layout.buckets])
    return [piece.view(bucket.rows, bucket.queries) for piece, bucket in zip(pieces, layout.buckets, strict=True)]


def resized(table_RX: Any, old: int, new: int) -> Tensor:
    """The (2 old - 1)^2 rows for patches of a relative table, bicubically on the grid of another size."""
    square = torch.as_tensor(table_RX).T.unflatten(1, (2 * old - 1, 2 * old - 1))[None]
    grown = F.interpolate(square, size=(2 * new - 1, 2 * new - 1), mode="bicubic", align_corners=True)
    return grown[0].flatten(1).T
