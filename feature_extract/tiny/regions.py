"""The embedded detector: torchvision's Faster R-CNN on a small backbone, 64 classes such as "red circle".

    128 x 128 picture -> convolutions, colour histogram, stride 8 -> proposals -> RoIAlign 5 x 5 -> two FC -> class, box
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from feature_extract.sources.scene_drawing import CLASSES, COLORS, SHAPES
from feature_extract.tiny import weights_file
from feature_extract.tiny.pool import Pool, Schedule

SIDE, FEATURES = 128, 128


class Backbone(nn.Module):
    """Pictures (B, 3, H, W) -> one feature map (B, 128, H/8, W/8). Group norm: a picture's features are its own.

    Group norm over the picture weakens absolute colour (shapes were learned, colours hardly), so a soft colour
    histogram of each 8 x 8 cell travels beside the convolutions' 96 channels.
    """

    out_channels = 96 + 32

    def __init__(self) -> None:
        super().__init__()
        steps = ((3, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 96, 1))
        self.body = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU())
            for before, after, stride in steps
        ))
        self.colors = nn.Sequential(
            nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.AvgPool2d(8, ceil_mode=True)
        )

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"0": torch.cat([self.body(pictures), self.colors(pictures)], dim=1)}


class Predictor(FastRCNNPredictor):
    """Features (R, 128) -> scores (R, 65), box changes (R, 260).

    The score of "red circle" is that of red and that of circle: sixteen things to learn, each seen often, in place
    of 64. `CLASSES` are ordered colours by shapes.
    """

    def __init__(self) -> None:
        super().__init__(FEATURES, len(CLASSES) + 1)
        self.cls_score = nn.Linear(FEATURES, 1 + len(COLORS) + len(SHAPES))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        background, color, shape = self.cls_score(features).split([1, len(COLORS), len(SHAPES)], dim=1)
        scores = (color[:, :, None] + shape[:, None, :]).flatten(1)
        return torch.cat([background, scores], dim=1), self.bbox_pred(features)


def build() -> FasterRCNN:
    """The untrained detector."""
    backbone = Backbone()
    return FasterRCNN(
        backbone, min_size=SIDE, max_size=2 * SIDE, image_mean=[0.5] * 3, image_std=[0.25] * 3,
        rpn_anchor_generator=AnchorGenerator(((12, 20, 32, 48),), ((1.0,),)),
        rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=150, rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=40, rpn_batch_size_per_image=64, box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(backbone.out_channels * 25, FEATURES),
        box_predictor=Predictor(), box_batch_size_per_image=32, box_positive_fraction=0.5,
        box_score_thresh=0.3, box_nms_thresh=0.4, box_detections_per_img=16,
    )


def load_regions() -> FasterRCNN:
    """The trained detector, in evaluation mode."""
    detector = build()
    weights_file.read_into(weights_file.FOLDER / "regions.safetensors", detector)
    return detector


def train(pool: Pool, minutes: float, seed: int, out: Path) -> None:
    """AdamW on true boxes; prints recall and precision at IoU 0.5 with the right class on held-out scenes."""
    torch.manual_seed(seed)
    detector = build().train()
    pictures = [torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pool.pictures(SIDE)]
    targets = [_target(scene) for scene in pool.scenes]
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.01)
    for batch in Schedule(pool, 16, minutes, seed, optimizer, 2e-3):
        losses = detector([pictures[i] for i in batch.rows], [targets[i] for i in batch.rows])
        batch.step(sum(losses.values()), detector, 5.0)
        if batch.save:
            weights_file.write(out, detector, {"classes": list(CLASSES)})
    print(measure(detector.eval(), [pictures[i] for i in pool.held_out], [targets[i] for i in pool.held_out]))


@torch.inference_mode()
def measure(detector: FasterRCNN, pictures: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """Recall and precision at IoU 0.5, class included."""
    found = right = objects = detections = 0
    for picture, target in zip(pictures, targets, strict=True):
        seen = detector([picture])[0]
        objects, detections = objects + len(target["labels"]), detections + len(seen["labels"])
        if len(seen["labels"]):
            overlap = box_iou(target["boxes"], seen["boxes"]) * (target["labels"][:, None] == seen["labels"][None])
            found += int((overlap.amax(1) > 0.5).sum())
            right += int((overlap.amax(0) > 0.5).sum())
    return {"recall": found / objects, "precision": right / max(1, detections)}


def _target(scene: dict) -> dict[str, Tensor]:
    boxes = torch.tensor([thing["box"] for thing in scene["objects"]]) * SIDE
    labels = [CLASSES.index(f"{thing['color']} {thing['shape']}") + 1 for thing in scene["objects"]]
    return {"boxes": boxes, "labels": torch.tensor(labels)}
