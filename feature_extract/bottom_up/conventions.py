"""What the numbers in a C4 checkpoint do not say, for the four kinds of checkpoint that there are.

    state dict --kind_of--> caffe | preactivated | converted | detectron2 --OF_KIND--> Conventions

Every field changes what is stored; all of them stand in the manifest. Sources: the py-faster-rcnn code that bottom-up
attention was trained with, and the code that published each kind of checkpoint (docs/regions.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from opt.config import UserError

Kind = Literal["caffe", "preactivated", "converted", "detectron2"]


@dataclass(frozen=True)
class Conventions:
    """As the Caffe network has them; `OF_KIND` has those of the others."""

    short_side: int = 600
    """Pixels of the picture's shorter side."""
    long_side: int = 1000
    """At most so many pixels of its longer side."""
    resize: Literal["opencv", "pillow"] = "opencv"
    """opencv: means taken off, then bilinear without smoothing; pillow: bilinear with smoothing, rounded to bytes."""
    means: tuple[float, float, float] = (102.9801, 115.9465, 122.7717)
    """Of blue, green and red, in 0 to 255."""
    deviations: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What blue, green and red are divided by."""
    stem_padding: bool = False
    """The stem's maximum over 3 x 3 pads by one; otherwise it does not pad and rounds its size up."""
    stride_in_1x1: bool = True
    """A stage halves its map in the first block's 1 x 1 convolution; otherwise in the 3 x 3 one."""
    norm_epsilon: float = 1e-5
    """Added to the variance in frozen batch norm."""
    anchors: Literal["rounded", "centred"] = "rounded"
    """rounded: py-faster-rcnn's whole numbers about 7.5, ratio by ratio; centred: exact, about 0, size by size."""
    anchor_sizes: tuple[int, ...] = (64, 128, 256, 512)
    """Side of the square of the same area, in pixels of the resized picture; times height/width of 1/2, 1 and 2."""
    inclusive: bool = True
    """A box ends on its last pixel, so its width is x2 - x1 + 1 and it is cut at width - 1; otherwise x2 - x1."""
    proposal_side: float = 16.0
    """Proposals whose sides, in pixels of the original picture, are no longer than that are dropped."""
    proposals_before: int = 6000
    """So many proposals of the highest objectness enter suppression."""
    proposals: int = 300
    """So many leave it."""
    proposal_overlap: float = 0.7
    """Overlap (IoU) above which the proposal of lower objectness is suppressed."""
    pooling: Literal["maximum", "align"] = "maximum"
    """RoIPool, or RoIAlign whose boxes are shifted by half a cell (aligned)."""
    pooling_samples: int = 0
    """Samples along a side of each cell of RoIAlign; 0: as many as the cell is long."""
    res5_dilated: bool = True
    """res5 keeps the 14 x 14 cells and spreads its 3 x 3 convolutions by two; otherwise it halves them to 7 x 7."""
    background: Literal["first", "last"] = "first"
    """Where the background is among the classes."""
    attribute_background: Literal["first", "last", "none"] = "first"
    """Where "no attribute" is among the attributes; last: left out before the softmax, as its publisher does."""
    boxes: Literal["proposals", "regressed"] = "proposals"
    """Which boxes are stored: those that features were pooled from, or what the box head makes of them."""
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """What the box head's changes of x, y, width and height are divided by."""
    class_overlap: float = 0.3
    """Overlap above which the box of a lower score is suppressed, class by class."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Conventions).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise UserError(f"{name} {value!r}: expected {' or '.join(get_args(hint))}")


OF_KIND: dict[Kind, Conventions] = {
    "caffe": Conventions(),
    "preactivated": Conventions(
        means=(0.0, 0.0, 0.0), stride_in_1x1=False, norm_epsilon=2e-5, res5_dilated=False,
    ),
    "converted": Conventions(
        resize="pillow", anchors="centred", inclusive=False, proposal_side=0.0, background="last",
        attribute_background="last", boxes="regressed", box_weights=(10.0, 10.0, 5.0, 5.0),
    ),
    "detectron2": Conventions(
        resize="pillow", means=(103.53, 116.28, 123.675), stem_padding=True, anchors="centred",
        anchor_sizes=(32, 64, 128, 256, 512), inclusive=False, proposal_side=0.0, proposals=1000, pooling="align",
        res5_dilated=False, background="last", attribute_background="none", box_weights=(10.0, 10.0, 5.0, 5.0),
    ),
}


def kind_of(state: Mapping[str, Tensor]) -> Kind:
    """Which kind a checkpoint is, by its shapes (`opt.weights.detectron2.read` gives the names).

    Two outputs of objectness an anchor: trained in Caffe, and a network with a norm before its stem is preactivated.
    One output, and a hidden layer narrower than the map: converted from Caffe. As wide as the map: detectron2's own.
    """
    if len(state["rpn.objectness_logits.weight"]) * 2 == len(state["rpn.anchor_deltas.weight"]):
        return "preactivated" if "stem.norm.weight" in state else "caffe"
    outputs, inputs = state["rpn.conv.weight"].shape[:2]
    return "detectron2" if outputs == inputs else "converted"


def conventions_of(state: Mapping[str, Tensor]) -> Conventions:
    """Those of the checkpoint's kind, and what the file itself says: means, deviations, and a known attribute head.

    An attribute head under `roi_heads.attribute_predictor` came with RoIAlign of two samples a side (grid-feats-vqa).
    """
    conventions = OF_KIND[kind_of(state)]
    if "pixel_mean" in state:
        conventions = replace(conventions, means=_three(state["pixel_mean"]))
    if "pixel_std" in state:
        conventions = replace(conventions, deviations=_three(state["pixel_std"]))
    if kind_of(state) == "detectron2" and "attributes.fc.weight" in state:
        conventions = replace(conventions, pooling_samples=2)
    return conventions


def _three(tensor: Tensor) -> tuple[float, float, float]:
    blue, green, red = tensor.flatten().tolist()
    return blue, green, red
