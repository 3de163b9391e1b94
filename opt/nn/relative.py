"""What attention adds to its scores, by how a query and a key lie to each other, over packed sequences.

    place of each token --dense, bucket by bucket--> (b, L), (b, L) --pair--> row of a table --> (b, H, L, L) a layer

    relative positions   a learned number a head and a layer (VLMo, arXiv 2111.02358; BEiT, arXiv 2106.08254)
    prefix               -inf where a token must not look: pictures see pictures, text its picture and its own past
                         (BEiT-3, arXiv 2208.10442)

Shape legend: N packed tokens, b sequences of a bucket, L their padded length, H heads, P places, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.layout import AttentionLayout

Bias = Callable[[int], list[Tensor]]
"""By the number of a layer, what is added to the scores of each bucket."""


class RelativePositions(nn.Module):
    """A learned bias for each head and layer (VLMo's code, section 5.1 of our notes).

    Two patches have a row of the table by how many rows and columns they are apart, the class token three of its own;
    two words, or two frames, by their distance; tokens of different modalities one for each pair of them. Words from
    `text` on, frames from `frames` on have no place. frames 0: nothing is heard.
    """

    pair: Tensor

    def __init__(self, grid: int, text: int, frames: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads, self.starts = heads, {"text": 0, "image": text, "audio": text + 1 + grid**2}
        pair, rows = _pairs(grid, text, frames)
        self.register_buffer("pair", pair, persistent=False)
        self.table = nn.Parameter(torch.zeros(rows, layers * heads))

    def forward(self, place_N: Tensor, layout: AttentionLayout) -> Bias:
        """Of sequences whose tokens have these places, text, then pictures, then speech: `starts` says from where."""
        pairs = [self.pair[place_bL[:, :, None], place_bL[:, None, :]] for place_bL in dense(place_N, layout)]

        def bias(layer: int) -> list[Tensor]:
            table_RH = self.table[:, layer * self.heads : (layer + 1) * self.heads]
            return [F.embedding(pair_bLL, table_RH).permute(0, 3, 1, 2) for pair_bLL in pairs]

        return bias


def _pairs(grid: int, text: int, frames: int) -> tuple[Tensor, int]:
    """Row of the table for each query's and key's place (P, P) int64, and how many rows there are."""
    patch = torch.arange(grid**2)
    across = (patch[:, None] // grid - patch // grid + grid - 1) * (2 * grid - 1) + (
        patch[:, None] % grid - patch % grid + grid - 1)
    rows = (2 * grid - 1) ** 2
    image = F.pad(across, (1, 0, 1, 0), value=rows)  # the class token looks at patches
    image[1:, 0], image[0, 0] = rows + 1, rows + 2
    rows += 3
    blocks = [_distances(text) + rows, image]
    rows += 2 * text - 1
    if frames:
        blocks.append(_distances(1 + frames) + rows)
        rows += 2 * frames + 1
    pair = torch.block_diag(*blocks)
    ends = torch.tensor([len(block) for block in blocks]).cumsum(0).tolist()
    spans = [slice(end - len(block), end) for end, block in zip(ends, blocks, strict=True)]
    for one in spans:
        for other in spans:
            if one is not other:
                pair[one, other] = rows
                rows += 1
    return pair, rows


def _distances(length: int) -> Tensor:
    place = torch.arange(length)
    return place[:, None] - place + length - 1


def prefix(writes_N: Tensor, layout: AttentionLayout) -> Bias:
    """Tokens that are written, which end their sequences, see all before them and themselves; others see only others.

    writes_N bool: whether a token is written. A number for all heads and layers: 0 or -inf.
    """
    biases = []
    for writes_bL in dense(writes_N, layout):
        length = writes_bL.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=writes_bL.device).tril()
        open_bLL = ~writes_bL[:, None, :] | (writes_bL[:, :, None] & earlier)
        biases.append(torch.zeros(open_bLL.shape, device=writes_bL.device).masked_fill(~open_bLL, float("-inf"))[:, None])
    return lambda layer: biases


def dense(value_N: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """What tokens have, (b, L) for each bucket of a self-attention; padding repeats a token of its sequence."""
    assert layout.key is None
    pieces = value_N[layout.query].split([bucket.rows * bucket.queries for bucket in layout.buckets])
    return [piece.view(bucket.rows, bucket.queries) for piece, bucket in zip(pieces, layout.buckets, strict=True)]


def resized(table_RX: Any, old: int, new: int) -> Tensor:
    """The (2 old - 1)^2 rows for patches of a relative table, bilinearly on the grid of another size."""
    square = torch.as_tensor(table_RX).T.unflatten(1, (2 * old - 1, 2 * old - 1))[None]
    grown = F.interpolate(square, size=(2 * new - 1, 2 * new - 1), mode="bicubic", align_corners=True)
    return grown[0].flatten(1).T
