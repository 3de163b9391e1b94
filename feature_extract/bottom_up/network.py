"""The C4 network: ResNet stages 2 to 4 over the picture, proposals on their map, stage 5 over each proposal.

    pixels (1, 3, H, W) -> stem, res2, res3, res4 -> map (1, 1024, H/16, W/16) -> proposals (P, 4)
                                                      \\-> RoI pooling 14 x 14 -> res5 -> mean: features (P, 2048)
    features -> class scores (P, C), changes of boxes; features and the best class' embedding -> attributes (P, A)

Every size is read from a checkpoint's shapes, so a network of any depth and width can be built.
Shape legend: P proposals, C classes without background, A attributes, D feature width, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align, roi_pool

from feature_extract.bottom_up import boxes
from feature_extract.bottom_up.conventions import Conventions
from opt.config import UserError

POOLED = 14
"""Cells along each side of a pooled proposal."""
AT_ONCE = 100
"""Proposals that stage 5 sees at a time: bounds memory, and is the same for every picture."""


class FrozenNorm(nn.Module):
    """Batch norm whose statistics and weights are fixed."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.epsilon)


class Convolution(nn.Conv2d):
    """A convolution without bias and a norm behind it, before it, or none."""

    def __init__(
        self, before: int, after: int, side: int, stride: int, how: Conventions, norm: int = 0, dilation: int = 1
    ) -> None:
        super().__init__(before, after, side, stride, side // 2 * dilation, dilation, bias=False)
        self.norm = FrozenNorm(norm, how.norm_epsilon) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut (He et al. 2015, arXiv 1512.03385, Fig. 5)."""

    def __init__(self, before: int, inner: int, after: int, stride: int, dilation: int, how: Conventions) -> None:
        super().__init__()
        first, second = (stride, 1) if how.stride_in_1x1 else (1, stride)
        self.shortcut = Convolution(before, after, 1, stride, how, norm=after) if before != after else None
        self.conv1 = Convolution(before, inner, 1, first, how, norm=inner)
        self.conv2 = Convolution(inner, inner, 3, second, how, norm=inner, dilation=dilation)
        self.conv3 = Convolution(inner, after, 1, 1, how, norm=after)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (inner + (x if self.shortcut is None else self.shortcut(x))).relu()


class PreactivatedConvolution(Convolution):
    """Norm and rectifier, then the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        return nn.Conv2d.forward(self, self.norm(x).relu())


class PreactivatedBottleneck(nn.Module):
    """The same with norms and rectifiers before the convolutions (He et al. 2016, arXiv 1603.05027, Fig. 4e).

    normed: the input has passed the first norm and rectifier already.
    """

    def __init__(
        self, before: int, inner: int, after: int, stride: int, dilation: int, how: Conventions, normed: bool
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if how.stride_in_1x1 else (1, stride)
        self.norm = None if normed else FrozenNorm(before, how.norm_epsilon)
        self.shortcut = Convolution(before, after, 1, stride, how) if before != after else None
        self.conv1 = Convolution(before, inner, 1, first, how)
        self.conv2 = PreactivatedConvolution(inner, inner, 3, second, how, norm=inner, dilation=dilation)
        self.conv3 = PreactivatedConvolution(inner, after, 1, 1, how, norm=inner)

    def forward(self, x: Tensor) -> Tensor:
        seen = x if self.norm is None else self.norm(x).relu()
        inner = self.conv3(self.conv2(self.conv1(seen)))
        return inner + (x if self.shortcut is None else self.shortcut(seen))


class Stem(nn.Module):
    """A 7 x 7 convolution and a 3 x 3 maximum, each of stride 2. `norm`, on the pixels, where preactivated."""

    def __init__(self, width: int, preactivated: bool, how: Conventions) -> None:
        super().__init__()
        self.norm = FrozenNorm(3, how.norm_epsilon) if preactivated else None
        self.conv1 = Convolution(3, width, 7, 2, how, norm=width)
        self.padding = how.stem_padding

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels if self.norm is None else self.norm(pixels)).relu()
        return functional.max_pool2d(x, 3, 2, padding=int(self.padding), ceil_mode=not self.padding)


class ProposalHead(nn.Module):
    """A map's objectness and changes of each anchor: (N,), (N, 4), cell by cell."""

    def __init__(self, before: int, inner: int, outputs: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, inner, 3, padding=1)
        self.objectness_logits = nn.Conv2d(inner, outputs, 1)
        self.anchor_deltas = nn.Conv2d(inner, anchors * 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.conv(x).relu()
        objectness, changes = self.objectness_logits(hidden)[0], self.anchor_deltas(hidden)[0]
        if len(objectness) * 2 == len(changes):  # Caffe's: of all anchors that there is none, then that there is one
            objectness = objectness.unflatten(0, (2, -1)).softmax(dim=0)[1]
        return objectness.permute(1, 2, 0).flatten(), changes.permute(1, 2, 0).reshape(-1, 4)


class AttributeHead(nn.Module):
    """Features (P, D) and classes (P,), background among them -> attribute logits (P, A)."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        inner, before = shapes["attributes.fc.weight"]
        self.obj_embed = nn.Embedding(*shapes["attributes.obj_embed.weight"])
        self.fc, self.score = nn.Linear(before, inner), nn.Linear(inner, shapes["attributes.score.weight"][0])

    def forward(self, features_PD: Tensor, classes_P: Tensor) -> Tensor:
        return self.score(self.fc(torch.cat([features_PD, self.obj_embed(classes_P)], dim=1)).relu())


class Detections(NamedTuple):
    """Of every proposal: features (P, D), boxes (P, 4) in pixels of the resized picture, scores (P, C) and (P, A)."""

    features: Tensor
    boxes: Tensor
    scores: Tensor
    attributes: Tensor | None


class C4(nn.Module):
    """The network of a checkpoint's shapes, by short names (`opt.weights.detectron2`). Raises UserError for others."""

    anchors: Tensor

    def __init__(self, shapes: Mapping[str, torch.Size], how: Conventions) -> None:
        super().__init__()
        self.how = how
        preactivated = "stem.norm.weight" in shapes
        self.stem = Stem(shapes["stem.conv1.weight"][0], preactivated, how)
        self.res2 = _stage(shapes, "res2", 1, 1, how)
        self.res3 = _stage(shapes, "res3", 2, 1, how)
        self.res4 = _stage(shapes, "res4", 2, 1, how)
        self.res5 = _stage(shapes, "res5", *((1, 2) if how.res5_dilated else (2, 1)), how)
        width, features = shapes["rpn.conv.weight"][1], shapes["cls_score.weight"][1]
        self.map_norm = FrozenNorm(width, how.norm_epsilon) if preactivated else None
        self.last_norm = FrozenNorm(features, how.norm_epsilon) if preactivated else None
        anchors = shapes["rpn.anchor_deltas.weight"][0] // 4
        self.register_buffer("anchors", torch.zeros(anchors, 4) if "anchors" in shapes else boxes.cell_anchors(how))
        if len(self.anchors) != anchors:
            raise UserError(f"it has {anchors} anchors a cell; say of which sizes (anchor_sizes, times three ratios)")
        self.rpn = ProposalHead(width, shapes["rpn.conv.weight"][0], shapes["rpn.objectness_logits.weight"][0], anchors)
        self.cls_score = nn.Linear(features, shapes["cls_score.weight"][0])
        self.bbox_pred = nn.Linear(features, shapes["bbox_pred.weight"][0])
        self.attributes = AttributeHead(shapes) if "attributes.score.weight" in shapes else None

    def forward(self, pixels: Tensor, scale: float) -> Detections:
        """Every proposal of a prepared picture; `scale` is what it was multiplied by."""
        x = self.res4(self.res3(self.res2(self.stem(pixels))))
        x = x if self.map_norm is None else self.map_norm(x).relu()
        objectness_N, changes_N4 = self.rpn(x)
        anchors_N4 = boxes.grid_anchors(self.anchors, *x.shape[-2:])
        size = (pixels.shape[-2], pixels.shape[-1])
        proposals_P4 = boxes.propose(objectness_N, changes_N4, anchors_N4, size, scale, self.how)
        features_PD = torch.cat([self.features(x, part) for part in proposals_P4.split(AT_ONCE)])
        logits = self.cls_score(features_PD)
        scores_PC = self._foreground(logits.softmax(dim=1))
        found = self._regressed(features_PD, scores_PC, proposals_P4, size)
        return Detections(features_PD, found, scores_PC, self._attributes(features_PD, logits.argmax(dim=1)))

    def features(self, x: Tensor, boxes_P4: Tensor) -> Tensor:
        """Boxes in the resized picture, pooled from its map and passed through stage 5, (P, D)."""
        scale = 1 / boxes.STRIDE
        if self.how.pooling == "maximum":
            pooled = roi_pool(x, [boxes_P4], POOLED, scale)
        else:
            pooled = roi_align(x, [boxes_P4], POOLED, scale, self.how.pooling_samples, aligned=True)
        x = self.res5(pooled)
        return (x if self.last_norm is None else self.last_norm(x).relu()).mean(dim=(2, 3))

    def _foreground(self, of_classes: Tensor) -> Tensor:
        return of_classes[:, 1:] if self.how.background == "first" else of_classes[:, :-1]

    def _regressed(self, features_PD: Tensor, scores_PC: Tensor, boxes_P4: Tensor, size: tuple[int, int]) -> Tensor:
        """The boxes to store: the proposals, or those that the box head makes of them for their best class."""
        if self.how.boxes == "proposals":
            return boxes_P4
        changes = self.bbox_pred(features_PD).unflatten(1, (-1, 4))
        classes = scores_PC.shape[1]
        if changes.shape[1] > classes:  # Caffe gives the background changes too
            changes = self._foreground(changes)
        if changes.shape[1] == classes:
            changes = changes[torch.arange(len(changes), device=changes.device), scores_PC.argmax(dim=1)]
        changed = boxes.decode(changes.reshape(-1, 4), boxes_P4, self.how.box_weights, self.how.inclusive)
        return boxes.cut(changed, *size, self.how.inclusive)

    def _attributes(self, features_PD: Tensor, classes_P: Tensor) -> Tensor | None:
        if self.attributes is None:
            return None
        logits = self.attributes(features_PD, classes_P)
        if self.how.attribute_background == "last":
            return logits[:, :-1].softmax(dim=1)
        return logits.softmax(dim=1)[:, int(self.how.attribute_background == "first"):]


def _stage(
    shapes: Mapping[str, torch.Size], stage: str, stride: int, dilation: int, how: Conventions
) -> nn.Sequential:
    """The blocks that the checkpoint has under a stage's name."""
    blocks: list[nn.Module] = []
    while (name := f"{stage}.{len(blocks)}") + ".conv1.weight" in shapes:
        inner, before = shapes[f"{name}.conv1.weight"][:2]
        after = shapes[f"{name}.conv3.weight"][0]
        if shapes[f"{name}.conv2.weight"][1] != inner:
            raise UserError("its convolutions are grouped (ResNeXt), which is not read")
        sizes = (before, inner, after, 1 if blocks else stride, dilation, how)
        if "stem.norm.weight" in shapes:
            blocks.append(PreactivatedBottleneck(*sizes, normed=name == "res5.0"))
        else:
            blocks.append(Bottleneck(*sizes))
    return nn.Sequential(*blocks)
