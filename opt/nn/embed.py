"""Embedders: text, regions and audio frames into the width that the encoder shares.

Each is token + position + modality type, then LayerNorm; a masked region or frame has its feature replaced by a learned
vector while its place (box, position) stays visible.
Shape legend: N tokens, R regions, T frames, D width, F feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opt.data.batch import FrameTable, RegionTable, TextTable
from opt.nn.dropout import Dropout


class TextEmbedder(nn.Module):
    """WordPiece ids: token + position + type, LayerNorm, dropout."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.modality = nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.LayerNorm(width, epsilon), Dropout(dropout)

    def forward(self, text: TextTable) -> Tensor:
        """(N, D)."""
        hidden_ND = self.token(text.ids) + self.position(text.positions) + self.modality
        return self.dropout(self.norm(hidden_ND))


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
    """Speech frames: FC and LayerNorm, then position and type, LayerNorm, dropout."""

    def __init__(self, feature_width: int, positions: int, width: int, dropout: float, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(feature_width))
        self.feature, self.feature_norm = nn.Linear(feature_width, width), nn.LayerNorm(width, epsilon)
        self.position = nn.Embedding(positions, width)
        self.modality = nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.LayerNorm(width, epsilon), Dropout(dropout)

    def forward(self, frames: FrameTable) -> Tensor:
        """(T, D)."""
        features_TF = torch.where(frames.masked[:, None], self.mask, frames.features.float())
        hidden_TD = self.feature_norm(self.feature(features_TF)) + self.position(frames.positions) + self.modality
        return self.dropout(self.norm(hidden_TD))


def geometry(boxes: Tensor) -> Tensor:
    """(R, 4) corners in [0, 1] -> (R, 7): corners, width, height, area (paper section 3.1)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack([x1, y1, x2, y2, width, height, width * height], dim=-1)
