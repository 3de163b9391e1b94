"""A feature pyramid for detection heads out of a transformer of patches (ViTDet, arXiv 2203.16527, section 3).

    pictures (B, 3, H, W) --cut--> patches --PatchEmbedder, MultiwayStack--> one map (B, D, H / p, W / p)
    the map --deconvolved, as it is, or pooled--> {"0": (B, C, H / 4, W / 4), "1": ...}, finest first

Pictures of any size go in: positions are interpolated between those that were learned.
Shape legend: B pictures, H and W their pixels, p pixels a side of a patch, D width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opt.data.batch import PatchTable
from opt.data.pack import PATCH
from opt.data.pixels import Sight, positions
from opt.nn.embed import PatchEmbedder
from opt.nn.multiway import MultiwayStack
from opt.nn.states import States, side_by_side

STRIDES = (4, 8, 16, 32)
"""Pixels between neighbours in each map."""


class PatchMap(nn.Module):
    """Pictures -> the last states of their patches, as a map. What the transformer knows of other modalities is not
    asked."""

    def __init__(self, sight: Sight, embedder: PatchEmbedder, stack: MultiwayStack) -> None:
        super().__init__()
        self.sight, self.embedder, self.stack = sight, embedder, stack

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        """(B, D, H / p, W / p) of pixels from 0 to 1. Raises ValueError where p does not divide H and W."""
        (count, _, high, wide), patch = pictures_B3HW.shape, self.sight.patch
        if high % patch or wide % patch:
            raise ValueError(f"pictures of {high} x {wide} pixels have no whole patches of {patch}")
        rows, columns = high // patch, wide // patch
        cut = pictures_B3HW.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
        places, shares = (torch.from_numpy(each).to(cut.device).repeat(count, 1)
                          for each in positions(rows, columns, self.sight.grid, 4))
        hidden = torch.zeros(len(places), dtype=torch.bool, device=cut.device)
        embedded = self.embedder(PatchTable(255 * cut.reshape(len(places), -1), places, shares, hidden))
        first = States(embedded[:1].expand(count, -1), torch.ones(count, dtype=torch.int64).numpy())
        patches = States(embedded[1:], rows * columns * first.lengths)
        states_ND = self.stack(*side_by_side([first, patches], [PATCH, PATCH]))
        return states_ND.unflatten(0, (count, -1))[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


class Pyramid(nn.Module):
    """Pictures -> maps by name, as torchvision's detectors ask of a backbone.

    The map of patches is the only one that is read; each of the pyramid's is made from it by deconvolutions that double
    it, or by pooling, and two convolutions (ViTDet's "simple feature pyramid"). Detectors must leave pixels from 0 to 1
    (image_mean 0, image_std 1), as the embedder normalises them itself.
    """

    def __init__(self, patches: PatchMap, channels: int = 256, strides: tuple[int, ...] = STRIDES) -> None:
        super().__init__()
        width, patch = patches.embedder.patch.out_features, patches.sight.patch
        if wrong := [stride for stride in strides if not _doubles(stride, patch)]:
            raise ValueError(f"a stride of {wrong[0]} is not {patch}, the patch's side, times or over a power of two")
        self.patches, self.out_channels = patches, channels
        self.levels = nn.ModuleList(_level(width, channels, patch, stride) for stride in strides)

    def forward(self, pictures_B3HW: Tensor) -> dict[str, Tensor]:
        """{"0": (B, C, H / strides[0], W / strides[0]), ...} of pixels from 0 to 1."""
        map_BDhw = self.patches(pictures_B3HW)
        return {str(number): level(map_BDhw) for number, level in enumerate(self.levels)}


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels at each place of a map (B, C, h, w)."""

    def forward(self, map_BChw: Tensor) -> Tensor:
        return super().forward(map_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _doubles(one: int, other: int) -> bool:
    """Whether one is the other, doubled so and so often."""
    low, high = min(one, other), max(one, other)
    return low > 0 and high % low == 0 and (high // low).bit_count() == 1


def _level(width: int, channels: int, patch: int, stride: int) -> nn.Sequential:
    """From a place every `patch` pixels to one every `stride`, half the channels at each doubling."""
    steps: list[nn.Module] = [nn.MaxPool2d(stride // patch)] if stride > patch else []
    while stride < patch:
        if steps:
            steps += [MapNorm(width), nn.GELU()]
        steps.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width, stride = width // 2, 2 * stride
    return nn.Sequential(*steps, nn.Conv2d(width, channels, 1, bias=False), MapNorm(channels),
                         nn.Conv2d(channels, channels, 3, padding=1, bias=False), MapNorm(channels))
