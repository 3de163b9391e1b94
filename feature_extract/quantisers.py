"""Quantisers of speech: the frames of a network to ids, as pretraining used them for targets.

A quantiser is a module: the output of a transformers network for one recording -> ids (T, G). `codebooks`: the entries
of each codebook. Shape legend: T frames, D width of the transformer, G codebooks, K centroids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opt.config import UserError

MOST_CENTROIDS = 2**15
"""Ids are stored as int16."""


class ProductQuantiser(nn.Module):
    """wav2vec 2.0's quantiser (arXiv 2006.11477, section 2): the best entry of each codebook for a convolved frame."""

    def __init__(self, projection: nn.Linear, groups: int) -> None:
        super().__init__()
        self.projection = projection
        self.codebooks = (projection.out_features // groups,) * groups

    def forward(self, output: Any) -> Tensor:
        """Ids (T, G), from what the convolutions give, behind its LayerNorm."""
        return self.projection(output.extract_features[0]).unflatten(-1, (len(self.codebooks), -1)).argmax(-1)


class Centroids(nn.Module):
    """HuBERT's quantiser (arXiv 2106.07447, section II.A): the nearest k-means centroid of a layer's output."""

    def __init__(self, centroids_KD: Tensor) -> None:
        super().__init__()
        self.register_buffer("centroids_KD", centroids_KD)
        self.codebooks = (len(centroids_KD),)

    def forward(self, output: Any) -> Tensor:
        """Ids (T, 1)."""
        centroids_KD = self.get_buffer("centroids_KD")
        return (centroids_KD.square().sum(1) - 2 * output.last_hidden_state[0] @ centroids_KD.T).argmin(1, keepdim=True)


Quantiser = ProductQuantiser | Centroids


def read_centroids(path: Path, width: int) -> Centroids:
    """Centroids (K, D) from a .npy file. Raises UserError where there is none that fits a network of `width`."""
    if not path.is_file():
        raise UserError(f"audio codes: this network has no quantiser of its own; put k-means centroids of the layer "
                        f"asked for, an array (K, {width}), at {path}, or leave out the codes")
    try:
        centroids_KD = np.load(path, allow_pickle=False).astype(np.float32)
    except Exception as error:  # a file may be broken in any way
        raise UserError(f"audio codes: {path} is no array of numpy.save ({error})") from error
    if centroids_KD.ndim != 2 or centroids_KD.shape[1] != width or not 0 < len(centroids_KD) <= MOST_CENTROIDS:
        raise UserError(f"audio codes: {path} has shape {centroids_KD.shape}; expected (K, {width}), K at most "
                        f"{MOST_CENTROIDS}")
    return Centroids(torch.from_numpy(centroids_KD))
