"""Regions by a Faster R-CNN of detectron2, where detectron2 is installed: features as its box predictor reads them.

    picture -> detectron2: backbone, proposals, RoI head -> box predictor's input (P, D) -> its `inference` -> R rows

Weights: CONFIG.yaml:CHECKPOINT, detectron2's configuration and a .pkl, .pth or .safetensors of the model's weights.
C4 checkpoints need no detectron2: the backend `bottom_up` reads them.
Shape legend: P proposals, R kept detections, D feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from feature_extract.description import describe
from feature_extract.regions import Regions, RegionSettings, best, read_names
from opt.config import UserError
from opt.weights.state import read_state

MISSING = ("regions {weights!r}: detectron2 is not installed; build it from its repository "
           "(https://github.com/facebookresearch/detectron2, INSTALL.md), or use bottom_up:CHECKPOINT, which reads "
           "detectron2's C4 checkpoints without it")


class Detectron2Detector:
    """A `GeneralizedRCNN` with one box predictor; `config` is detectron2's, complete."""

    attributes: tuple[str, ...] = ()

    def __init__(
        self, model: Any, config: Any, classes: tuple[str, ...], weights: str, settings: RegionSettings
    ) -> None:
        from detectron2.data.transforms import ResizeShortestEdge

        self.model, self.config = model.eval().requires_grad_(False), config
        self.classes, self.weights, self.settings = classes, weights, settings
        self.resize = ResizeShortestEdge([config.INPUT.MIN_SIZE_TEST] * 2, config.INPUT.MAX_SIZE_TEST)
        self.predictor = model.roi_heads.box_predictor
        self.predictor.test_topk_per_image = settings.max_regions
        self.predictor.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        self.seen = inputs[0], outputs

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Regions:
        """detectron2's detections, filled up to `min_regions` where they are fewer."""
        rgb = np.asarray(picture)
        read = rgb if self.config.INPUT.FORMAT == "RGB" else rgb[:, :, ::-1]
        resized = self.resize.get_transform(read).apply_image(read).astype(np.float32)
        images = self.model.preprocess_image([{"image": torch.from_numpy(resized.transpose(2, 0, 1).copy())}])
        maps = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, maps, None)
        self.model.roi_heads(images, maps, proposals, None)
        features_PD, predictions = self.seen
        found, rows = self._detections(predictions, proposals)
        probabilities = self.predictor.predict_probs(predictions, proposals)[0][:, :-1]
        top_classes, top_scores = best(probabilities[rows], self.settings.top_classes)
        height, width = images.image_sizes[0]
        boxes = found.pred_boxes.tensor.cpu().numpy() / np.array([width, height] * 2, np.float32)
        return Regions(
            features=features_PD[rows].flatten(1).cpu().numpy().astype(np.float16),
            boxes=np.clip(boxes, 0, 1),
            classes=found.pred_classes.cpu().numpy().astype(np.int16),
            scores=found.scores.cpu().numpy(),
            top_classes=top_classes if self.settings.top_classes else None,
            top_scores=top_scores if self.settings.top_classes else None,
        )

    def _detections(self, predictions: Any, proposals: Any) -> tuple[Any, torch.Tensor]:
        """detectron2's instances, best first, and the proposal of each; below the threshold where they are too few."""
        found, rows = self._above(self.settings.score_threshold, predictions, proposals)
        if len(rows) < self.settings.min_regions:
            found, rows = self._above(-1.0, predictions, proposals)
            found, rows = found[: self.settings.min_regions], rows[: self.settings.min_regions]
        return found, rows

    def _above(self, threshold: float, predictions: Any, proposals: Any) -> tuple[Any, torch.Tensor]:
        """The same above a threshold, less boxes of no size, which `detector_postprocess` leaves out too."""
        self.predictor.test_score_thresh = threshold
        (found,), (rows,) = self.predictor.inference(predictions, proposals)
        boxes_R4 = found.pred_boxes.tensor
        kept = (boxes_R4[:, 2:] > boxes_R4[:, :2]).all(dim=1)
        return found[kept], rows[kept]

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings, and detectron2's whole configuration."""
        about = describe("detectron2_detector", self.weights, self.model, self.settings)
        return {**about, "config": self.config.dump()}


def load(weights: str, settings: RegionSettings, device: str) -> Detectron2Detector:
    """Open CONFIG.yaml:CHECKPOINT. Raises UserError without detectron2, such a file, or a fit of the two."""
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
    except ImportError as error:
        raise UserError(MISSING.format(weights=weights)) from error
    config_name, _, name = weights.partition(":")
    if not name:
        raise UserError(f"regions {weights!r}: expected CONFIG.yaml:CHECKPOINT")
    config = get_cfg()
    try:
        config.merge_from_file(config_name, allow_unsafe=False)
    except Exception as error:  # missing, no YAML, or a key that detectron2 does not know
        raise UserError(f"{config_name} could not be read as a configuration of detectron2: {error}") from error
    config.MODEL.DEVICE, config.MODEL.MASK_ON, config.MODEL.KEYPOINT_ON = device, False, False
    model = build_model(config)
    try:
        missing = model.load_state_dict(read_state(Path(name)), strict=False).missing_keys
    except RuntimeError as error:
        raise UserError(f"{name} does not fit {config_name}: {str(error).splitlines()[1].strip()}") from error
    if missing := [key for key in missing if not key.startswith("pixel_")]:
        raise UserError(f"{name} does not fit {config_name}: it holds no {missing[0]}")
    if not hasattr(getattr(model.roi_heads, "box_predictor", None), "inference"):
        raise UserError(f"{config_name}: expected a model with one box predictor, not a cascade")
    return Detectron2Detector(model, config, _classes(Path(name), config), weights, settings)


def _classes(path: Path, config: Any) -> tuple[str, ...]:
    """Lines of CHECKPOINT.classes.txt, else the names of the data set that the configuration tests on."""
    from detectron2.data import MetadataCatalog

    listed, count = path.with_suffix(".classes.txt"), config.MODEL.ROI_HEADS.NUM_CLASSES
    known = [MetadataCatalog.get(name).get("thing_classes") for name in config.DATASETS.TEST]
    names = read_names(listed) if listed.exists() else tuple(next((one for one in known if one), ()))
    if len(names) != count:
        raise UserError(f"{path} has {count} classes and {len(names)} names: write one name a line into {listed}")
    return names
