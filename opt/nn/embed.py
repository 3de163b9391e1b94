"""Embedders: text, regions, audio frames and patches of pictures into the width that an encoder reads.

Each is token + position, and modality type and LayerNorm where the encoder wants them; a masked region, frame or patch
has its feature replaced by a learned vector while its place (box, position) stays visible.
Shape legend: N tokens, R regions, T frames, P patches, D width, F feature width, K rows that make a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.batch import FrameTable, PatchTable, RegionTable, TextTable
from opt.data.pixels import Sight
from opt.nn.dropout import Dropout


class TextEmbedder(nn.Module):
    """Ids of words: token + position + type, LayerNorm, dropout. bare: token + position alone (CLIP). placed: False
    leaves positions to attention."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, epsilon: float = 1e-5,
                 bare: bool = False, placed: bool = True) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width) if placed else None
        self.modality = None if bare else nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.Identity() if bare else nn.LayerNorm(width, epsilon), Dropout(dropout)

    def forward(self, text: TextTable) -> Tensor:
        """(N, D)."""
        return self.at(text.ids, text.positions)

    def at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and their positions of any shape: (..., D)."""
        hidden = self.token(ids) if self.position is None else self.token(ids) + self.position(positions)
        return self.dropout(self.norm(hidden if self.modality is None else hidden + self.modality))


class RegionEmbedder(nn.Module):
    """Region feature and 7-d box [x1, y1, x2, y2, w, h, w h], one FC and LayerNorm each, summed (paper section 3.1)."""

    def __init__(self, feature_width: int, width: int, dropout: float, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(feature_width))
        self.feature, self.feature_norm = nn.Linear(feature_width, width), nn.LayerNorm(width, epsilon)
        self.box, self.box_norm = nn.Linear(7, width), nn.LayerNorm(width, epsilon)
        self.modality = nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.LayerNorm(width, epsilon), Dropout(dropout)

    def forward(self, regions: RegionTable) -> Tensor:
        """(R, D)."""
        features_RF = torch.where(regions.masked[:, None], self.mask, regions.features.float())
        hidden_RD = self.feature_norm(self.feature(features_RF)) + self.box_norm(self.box(geometry(regions.boxes)))
        return self.dropout(self.norm(hidden_RD + self.modality))


class FrameEmbedder(nn.Module):
    """Speech frames: FC and LayerNorm, then position and type, LayerNorm, dropout. first: entry 0 is learned, as the
    class token of pictures. masks: frames can be hidden. placed: False leaves positions to attention."""

    def __init__(self, feature_width: int, positions: int, width: int, dropout: float, epsilon: float = 1e-5,
                 first: bool = False, masks: bool = True, placed: bool = True) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, width)) if first else None
        self.mask = nn.Parameter(torch.zeros(feature_width)) if masks else None
        self.feature, self.feature_norm = nn.Linear(feature_width, width), nn.LayerNorm(width, epsilon)
        self.position = nn.Embedding(positions, width) if placed else None
        self.modality = nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.LayerNorm(width, epsilon), Dropout(dropout)

    def forward(self, frames: FrameTable) -> Tensor:
        """(T, D), or (1 + T, D) with a first entry."""
        features_TF = frames.features.float()
        if self.mask is not None:
            features_TF = torch.where(frames.masked[:, None], self.mask, features_TF)
        hidden_TD = self.feature_norm(self.feature(features_TF))
        if self.position is not None:
            hidden_TD = hidden_TD + self.position(frames.positions)
        if self.first is not None:
            hidden_TD = torch.cat([self.first, hidden_TD])
        return self.dropout(self.norm(hidden_TD + self.modality))


class PatchEmbedder(nn.Module):
    """Patches of pixels: one FC and a position each, behind a learned class token (ViT, arXiv 2010.11929, section 3.1).

    The table of positions has a place for the class token, its first, and one for each patch of a square. bias: of the
    FC. first_norm: LayerNorm before the encoder (CLIP). masks: patches can be hidden, with a vector in place of what
    the FC makes of their pixels (BEiT, arXiv 2106.08254, section 2.3). placed: False leaves positions to attention.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, sight: Sight, width: int, dropout: float = 0.0, bias: bool = True, first_norm: bool = False,
        epsilon: float = 1e-5, masks: bool = False, placed: bool = True,
    ) -> None:
        super().__init__()
        values = 3 * sight.patch**2
        self.first = nn.Parameter(torch.zeros(1, width))
        self.mask = nn.Parameter(torch.zeros(width)) if masks else None
        self.patch = nn.Linear(values, width, bias)
        self.position = nn.Embedding(1 + sight.grid**2, width) if placed else None
        self.norm, self.dropout = nn.LayerNorm(width, epsilon) if first_norm else nn.Identity(), Dropout(dropout)
        for name, channels in (("mean", sight.mean), ("deviation", sight.deviation)):
            self.register_buffer(name, torch.tensor(channels).repeat_interleave(values // 3), persistent=False)

    def forward(self, patches: PatchTable) -> Tensor:
        """(1 + P, D): the class token first."""
        pixels_PF = (patches.pixels.float() / 255 - self.mean) / self.deviation
        hidden_PD = self.patch(pixels_PF)
        if self.mask is not None:
            hidden_PD = torch.where(patches.masked[:, None], self.mask, hidden_PD)
        if self.position is None:
            return self.dropout(self.norm(torch.cat([self.first, hidden_PD])))
        table = self.position.weight
        if patches.places.shape[1] == 1:
            position_PD = self.position(patches.places[:, 0])
        else:
            position_PD = F.embedding_bag(patches.places, table, mode="sum", per_sample_weights=patches.shares)
        return self.dropout(self.norm(torch.cat([self.first + table[:1], hidden_PD + position_PD])))


def geometry(boxes: Tensor) -> Tensor:
    """(R, 4) corners in [0, 1] -> (R, 7): corners, width, height, area (paper section 3.1)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack([x1, y1, x2, y2, width, height, width * height], dim=-1)
