"""Relative positions whose table lies in pieces, one for each modality and one across modalities: a stage may teach
words their order and leave what pictures know of rows and columns as it is, to the bit.

Shape legend: N packed tokens, R rows of the table, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.layout import AttentionLayout
from opt.nn.relative import Bias, RelativePositions, dense


class OwnedPositions(nn.Module):
    """As `RelativePositions`; `own` holds its rows by who owns them: "text", "image", "audio", and "across"."""

    pair: Tensor

    def __init__(self, grid: int, text: int, frames: int, heads: int, layers: int) -> None:
        super().__init__()
        whole = RelativePositions(grid, text, frames, heads, layers)
        self.heads, self.starts = heads, whole.starts
        self.register_buffer("pair", whole.pair, persistent=False)
        borders = {"text": (0, text), "image": (text, text + 1 + grid**2),
                   "audio": (text + 1 + grid**2, len(whole.pair))}
        within = {name: whole.pair[first:end, first:end] for name, (first, end) in borders.items() if end > first}
        first_row = {name: int(rows.min()) for name, rows in within.items()}
        first_row["across"] = max(int(rows.max()) for rows in within.values()) + 1
        names = sorted(first_row, key=first_row.__getitem__)
        ends = [*(first_row[name] for name in names[1:]), len(whole.table)]
        self.own = nn.ParameterDict({name: torch.zeros(end - first_row[name], layers * heads)
                                     for name, end in zip(names, ends, strict=True)})

    def bias(self, place_N: Tensor, layout: AttentionLayout) -> Bias:
        """Of sequences whose tokens have these places: `starts` says from where those of a modality count."""
        pairs = [self.pair[place_bL[:, :, None], place_bL[:, None, :]] for place_bL in dense(place_N, layout)]
        table_RX = torch.cat(list(self.own.values()))

        def of_layer(layer: int) -> list[Tensor]:
            table_RH = table_RX[:, layer * self.heads : (layer + 1) * self.heads]
            return [F.embedding(pair_bLL, table_RH).permute(0, 3, 1, 2) for pair_bLL in pairs]

        return of_layer
