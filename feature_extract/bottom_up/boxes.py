"""Boxes of the region proposal network and of the box head: anchors, decoding, cutting, suppression, choice.

    objectness, changes of every anchor --propose--> boxes (P, 4), best first
    boxes (P, 4), class scores (P, C) --strongest--> a confidence and a class of each

Shape legend: A anchors a cell, H, W rows and columns of the map, N = H * W * A, P proposals, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import nms

from feature_extract.bottom_up.conventions import Conventions

STRIDE = 16
"""Pixels between two cells of the map."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of anchors."""
LARGEST_GROWTH = math.log(1000 / 16)
"""The logarithm of a side grows by no more: from 16 to 1,000 pixels."""


def cell_anchors(conventions: Conventions) -> Tensor:
    """The anchors of the first cell, (A, 4): x1 y1 x2 y2 in pixels of the resized picture."""
    if conventions.anchors == "centred":
        sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio))
                 for size in conventions.anchor_sizes for ratio in RATIOS]
        return torch.tensor([(-width / 2, -height / 2, width / 2, height / 2) for width, height in sides])
    anchors = []
    for ratio in RATIOS:  # a base of 16 x 16 pixels whose last pixel is 15, rounded, then scaled
        width = round(math.sqrt(STRIDE**2 / ratio))
        height = round(width * ratio)
        for size in conventions.anchor_sizes:
            half_width, half_height = ((side * size / STRIDE - 1) / 2 for side in (width, height))
            centre = (STRIDE - 1) / 2
            anchors.append((centre - half_width, centre - half_height, centre + half_width, centre + half_height))
    return torch.tensor(anchors)


def grid_anchors(anchors_A4: Tensor, rows: int, columns: int) -> Tensor:
    """The anchors of a whole map, (N, 4), row by row, cell by cell."""
    y, x = (torch.arange(count, device=anchors_A4.device) * float(STRIDE) for count in (rows, columns))
    corners = torch.cartesian_prod(y, x)[:, [1, 0, 1, 0]]
    return (corners[:, None] + anchors_A4[None]).reshape(-1, 4)


def decode(changes_P4: Tensor, boxes_P4: Tensor, weights: tuple[float, ...], inclusive: bool) -> Tensor:
    """Boxes moved by changes of their centre, in sides, and of the logarithm of their sides (R-CNN, Eq. 1-4)."""
    sides = boxes_P4[:, 2:] - boxes_P4[:, :2] + float(inclusive)
    centres = boxes_P4[:, :2] + 0.5 * sides
    changes_P4 = changes_P4 / changes_P4.new_tensor(weights)
    centres = changes_P4[:, :2] * sides + centres
    sides = changes_P4[:, 2:].clamp(max=LARGEST_GROWTH).exp() * sides
    return torch.cat([centres - 0.5 * sides, centres + 0.5 * sides], dim=1)


def cut(boxes_P4: Tensor, height: float, width: float, inclusive: bool) -> Tensor:
    """Boxes cut at the picture's edges: at the last pixel, or behind it."""
    edges = boxes_P4.new_tensor([width, height, width, height]) - float(inclusive)
    return boxes_P4.clamp(min=0).minimum(edges)


def suppress(boxes_P4: Tensor, scores_P: Tensor, overlap: float, inclusive: bool) -> Tensor:
    """Places of the boxes that no better one overlaps by more than `overlap`, best first."""
    return nms(boxes_P4 + boxes_P4.new_tensor([0, 0, 1, 1]) * float(inclusive), scores_P, overlap)


def propose(
    objectness_N: Tensor, changes_N4: Tensor, anchors_N4: Tensor, size: tuple[int, int], scale: float, how: Conventions
) -> Tensor:
    """At most `how.proposals` boxes (P, 4) of a resized picture of `size` rows and columns, best first.

    `scale` is what the picture was multiplied by. Caffe drops small boxes before it takes the best, detectron2 after.
    """
    boxes = decode(changes_N4, anchors_N4, (1.0, 1.0, 1.0, 1.0), how.inclusive)
    boxes = cut(boxes, *size, how.inclusive)
    sides = boxes[:, 2:] - boxes[:, :2]
    large = ((sides > 0) & (sides + float(how.inclusive) > how.proposal_side * scale)).all(dim=1)
    order = objectness_N.argsort(descending=True, stable=True)
    if how.inclusive:
        order = order[large[order]][: how.proposals_before]
    else:
        order = order[: how.proposals_before]
        order = order[large[order]]
    kept = suppress(boxes[order], objectness_N[order], how.proposal_overlap, how.inclusive)
    return boxes[order][kept[: how.proposals]]


def strongest(boxes_P4: Tensor, scores_PC: Tensor, most: int, how: Conventions) -> tuple[Tensor, Tensor]:
    """Confidence (P,) and class (P,) of each box: its best score among the classes in which it is not suppressed.

    Confidence 0 and the best class where it is suppressed in all. The `most` highest confidences are exact, the others
    may be too low: a class whose best score is below them all can change none of them, and is passed over.
    """
    if not len(boxes_P4):
        return scores_PC.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=scores_PC.device)
    confidence_P, classes_P = torch.zeros_like(scores_PC[:, 0]), scores_PC.argmax(dim=1)
    peaks = scores_PC.amax(dim=0)
    for column in peaks.argsort(descending=True, stable=True).tolist():
        if most <= len(confidence_P) and peaks[column] < confidence_P.kthvalue(len(confidence_P) - most + 1).values:
            break
        kept = suppress(boxes_P4, scores_PC[:, column], how.class_overlap, how.inclusive)
        better = kept[scores_PC[kept, column] > confidence_P[kept]]
        confidence_P[better], classes_P[better] = scores_PC[better, column], column
    return confidence_P, classes_P
