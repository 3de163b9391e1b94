"""Regions by any Faster, Mask or Keypoint R-CNN of torchvision: features after RoI pooling and the box head.

    picture -> backbone -> proposals -> RoIAlign -> box head (P, D) -> classes, boxes -> NMS -> R rows of (P, D)

Weights: "tiny" (the embedded detector), or BUILDER:CHECKPOINT, a torchvision builder and a file of its state
dict, .safetensors, .pt or .pth, bare or under "model" or "state_dict", such as fasterrcnn_resnet50_fpn_v2:detector.pt.
Shape legend: P proposals, C classes without background, R kept detections, D feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.description import describe
from feature_extract.regions import Regions, RegionSettings, best, read_names
from opt.config import UserError
from opt.weights.state import read_state

PREDICTOR = "roi_heads.box_predictor.cls_score.weight"
KEYPOINTS = "roi_heads.keypoint_predictor.kps_score_lowres.weight"
FAMILIES = ("fasterrcnn*", "maskrcnn*", "keypointrcnn*")
"""Builders of a `FasterRCNN`; masks and keypoints are not computed."""


class TorchvisionDetector:
    """A Faster R-CNN whose detections keep the box-head feature of the proposal that each came from."""

    attributes: tuple[str, ...] = ()

    def __init__(
        self,
        detector: FasterRCNN,
        classes: tuple[str, ...],
        weights: str,
        settings: RegionSettings,
        device: str = "cpu",
    ) -> None:
        self.detector = detector.eval().requires_grad_(False).to(device)
        self.detector.roi_heads.score_thresh = settings.score_threshold
        self.detector.roi_heads.detections_per_img = settings.max_regions
        self.classes, self.weights, self.settings, self.device = classes, weights, settings, device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Regions:
        """The same boxes, classes and scores as `detector([pixels])`; where those are few, filled up to `min_regions`.

        Raises ValueError for a picture of which the detector's own size leaves no line.
        """
        heads, size = self.detector.roi_heads, (picture.height, picture.width)
        if min(size) * self.detector.transform.max_size < max(size):
            raise ValueError(f"a picture of {size[1]:,} x {size[0]:,} pixels is too narrow")
        pixels = pil_to_tensor(picture).to(self.device).float() / 255
        images, _ = self.detector.transform([pixels])
        maps = self.detector.backbone(images.tensors)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, _ = self.detector.rpn(images, maps)
        features_PD = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes))
        logits, deltas = heads.box_predictor(features_PD)
        boxes_PC4 = clip_boxes_to_image(heads.box_coder.decode(deltas, proposals), images.image_sizes[0])[:, 1:]
        scores_PC = logits.softmax(-1)[:, 1:]
        rows, columns, scores_R = self._detections(scores_PC, boxes_PC4)
        top_classes, top_scores = best(scores_PC[rows], self.settings.top_classes)
        boxes_R4 = resize_boxes(boxes_PC4[rows, columns], images.image_sizes[0], size)
        scale = np.array([size[1], size[0], size[1], size[0]], np.float32)
        return Regions(
            features=features_PD[rows].cpu().numpy().astype(np.float16),
            boxes=np.clip(boxes_R4.cpu().numpy() / scale, 0, 1),
            classes=columns.cpu().numpy().astype(np.int16),
            scores=scores_R.cpu().numpy(),
            top_classes=top_classes if self.settings.top_classes else None,
            top_scores=top_scores if self.settings.top_classes else None,
        )

    def _detections(self, scores_PC: Tensor, boxes_PC4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Proposal, class and score of each detection, best first: `RoIHeads.postprocess_detections` and its origin.

        A box below the threshold suppresses none above it, so what fills up only follows what was found. Of equal
        scores, usual below it, the first proposal's comes first.
        """
        heads = self.detector.roi_heads
        scores, boxes = scores_PC.reshape(-1), boxes_PC4.reshape(-1, 4)
        found = self._suppressed(torch.where(scores > heads.score_thresh)[0], scores, boxes)
        found = found[: heads.detections_per_img]
        if len(found) < self.settings.min_regions:
            every = self._suppressed(torch.arange(len(scores), device=scores.device), scores, boxes).sort().values
            found = every[scores[every].argsort(descending=True, stable=True)][: self.settings.min_regions]
        return found // scores_PC.shape[1], found % scores_PC.shape[1], scores[found]

    def _suppressed(self, kept: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
        """Those of `kept`, places in `scores`, that have a size and survive suppression within their class."""
        heads = self.detector.roi_heads
        kept = kept[remove_small_boxes(boxes[kept], min_size=1e-2)]
        labels = kept % len(self.classes) + 1
        return kept[batched_nms(boxes[kept], scores[kept], labels, heads.nms_thresh)]

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings."""
        return describe("torchvision_detector", self.weights, self.detector, self.settings)


def load(weights: str, settings: RegionSettings, device: str) -> TorchvisionDetector:
    """Open "tiny" or BUILDER:CHECKPOINT. Raises UserError when there is no such builder, file or match of the two."""
    if weights == "tiny":
        from feature_extract.tiny import weights_file
        from feature_extract.tiny.regions import load_regions

        classes = weights_file.read_config(weights_file.FOLDER / "regions.safetensors")["classes"]
        return TorchvisionDetector(load_regions(), tuple(classes), weights, settings, device)
    builder, _, name = weights.partition(":")
    models = torchvision.models
    detectors = [one for family in FAMILIES for one in models.list_models(models.detection, include=family)]
    if builder not in detectors or not name:
        names = ", ".join(detectors)
        raise UserError(f"regions {weights!r}: expected tiny or BUILDER:CHECKPOINT, BUILDER one of {names}")
    state = read_state(Path(name))
    if PREDICTOR not in state:
        raise UserError(f"{name} holds no {PREDICTOR}: it is not the state dict of a torchvision Faster R-CNN")
    count = len(state[PREDICTOR])
    sizes = {"num_keypoints": state[KEYPOINTS].shape[1]} if KEYPOINTS in state else {}
    detector = models.get_model(builder, weights=None, weights_backbone=None, num_classes=count, **sizes)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{name} does not fit {builder}: {_misfit(detector, state)}") from error
    return TorchvisionDetector(detector, _classes(Path(name), builder, count), weights, settings, device)


def _misfit(detector: FasterRCNN, state: dict[str, Tensor]) -> str:
    """Where a state dict differs from what the detector has, the first few names of each kind."""
    own = detector.state_dict()
    kinds = {"lacks": own.keys() - state.keys(), "has besides": state.keys() - own.keys(),
             "has of another size": {name for name in own.keys() & state.keys()
                                     if own[name].shape != state[name].shape}}  # fmt: skip
    said = []
    for verb, names in kinds.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said += [f"it {verb} {', '.join(sorted(names)[:3])}{more}"] if names else []
    return "; ".join(said)


def _classes(path: Path, builder: str, count: int) -> tuple[str, ...]:
    """Class names: lines of CHECKPOINT.classes.txt, else COCO's when the count is COCO's. Background is left out."""
    listed = path.with_suffix(".classes.txt")
    if listed.exists():
        names = read_names(listed)
    else:
        names = tuple(torchvision.models.get_model_weights(builder).DEFAULT.meta["categories"][1:])
    if len(names) != count - 1:
        raise UserError(f"{path} has {count - 1} classes and {len(names)} names: write one name a line into {listed}")
    return names
