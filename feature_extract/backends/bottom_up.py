"""Regions by bottom-up attention: a C4 Faster R-CNN on 1,600 classes and 400 attributes of Visual Genome.

    picture -> prepare -> C4: every proposal's feature, box, class scores, attributes -> strongest -> R rows of them

Weights: FILE, or FILE,NAME=VALUE,... with conventions that the file does not show, such as
`bottom_up:vg.pth,stride_in_1x1=false`. FILE is a checkpoint of detectron2's names, .pkl, .pth or .safetensors; names of
classes and attributes are in FILE.classes.txt and FILE.attributes.txt (the suffix replaced), or in objects_vocab.txt
and attributes_vocab.txt beside it.
Shape legend: P proposals, R regions, C classes without background, D feature width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from feature_extract.bottom_up.boxes import strongest
from feature_extract.bottom_up.conventions import Conventions, conventions_of
from feature_extract.bottom_up.network import C4
from feature_extract.bottom_up.pictures import prepare
from feature_extract.description import describe
from feature_extract.regions import BEST_ATTRIBUTES, Regions, RegionSettings, best, read_names
from opt import config as configuration
from opt.config import UserError
from opt.weights import detectron2


class BottomUp:
    """Bottom-up attention's choice: regions by their confidence after suppression, at least and at most so many."""

    def __init__(
        self,
        network: C4,
        classes: tuple[str, ...],
        attributes: tuple[str, ...],
        weights: str,
        settings: RegionSettings,
        device: str = "cpu",
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.classes, self.attributes = classes, attributes
        self.weights, self.settings, self.device = weights, settings, device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Regions:
        """The regions of an RGB picture. Raises ValueError for one too narrow to resize."""
        how, settings = self.network.how, self.settings
        pixels, scale = prepare(picture, how)
        found = self.network(pixels.to(self.device), min(scale))
        boxes_P4 = found.boxes / found.boxes.new_tensor([*scale, *scale])
        confidence_P, classes_P = strongest(boxes_P4, found.scores, settings.max_regions, how)
        order = confidence_P.argsort(descending=True, stable=True)
        passing = int((confidence_P >= settings.score_threshold).sum())
        rows = order[: min(max(passing, settings.min_regions), settings.max_regions)]
        top_classes, top_scores = best(found.scores[rows], settings.top_classes)
        attributes, attribute_scores = None, None
        if found.attributes is not None:
            attributes, attribute_scores = best(found.attributes[rows], BEST_ATTRIBUTES)
        size = np.array([picture.width, picture.height] * 2, np.float32)
        return Regions(
            features=found.features[rows].cpu().numpy().astype(np.float16),
            boxes=np.clip(boxes_P4[rows].cpu().numpy() / size, 0, 1),
            classes=classes_P[rows].cpu().numpy().astype(np.int16),
            scores=confidence_P[rows].cpu().numpy(),
            top_classes=top_classes if settings.top_classes else None,
            top_scores=top_scores if settings.top_classes else None,
            attributes=attributes,
            attribute_scores=attribute_scores,
        )

    def describe(self) -> dict[str, Any]:
        """Backend, weights, their SHA-256, settings, and every convention."""
        about = describe("bottom_up", self.weights, self.network, self.settings)
        return {**about, "conventions": configuration.to_dict(self.network.how)}


def load(weights: str, settings: RegionSettings, device: str) -> BottomUp:
    """Open FILE[,NAME=VALUE...]. Raises UserError when it is no C4 checkpoint, or lacks names of its classes."""
    path, given = _parse(weights)
    state = detectron2.read(path)
    how = conventions_of(state)
    merged = {**configuration.to_dict(how), **given}
    how = configuration.from_dict(Conventions, merged, f"regions {weights!r}")
    try:
        network = C4({name: tensor.shape for name, tensor in state.items()}, how)
        state.setdefault("anchors", network.anchors)
        state = {name: tensor for name, tensor in state.items() if name not in ("pixel_mean", "pixel_std")}
        network.load_state_dict(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} does not fit a C4 network: {str(error).splitlines()[-1].strip()}") from error
    classes = _names(path, "classes", "objects_vocab.txt", len(state["cls_score.bias"]) - 1)
    attributes: tuple[str, ...] = ()
    if network.attributes is not None:
        count = len(state["attributes.score.bias"]) - (how.attribute_background != "none")
        attributes = _names(path, "attributes", "attributes_vocab.txt", count)
    return BottomUp(network, classes, attributes, weights, settings, device)


def _parse(weights: str) -> tuple[Path, dict[str, Any]]:
    """FILE and the conventions given behind it: numbers, true, false, words, [lists]."""
    name, *given = re.split(r",(?=\w+=)", weights)
    values = {}
    for word in given:
        key, _, value = word.partition("=")
        try:
            values[key] = json.loads(value)
        except ValueError:  # a word without quotation marks
            values[key] = value
    return Path(name), values


def _names(path: Path, what: str, vocabulary: str, count: int) -> tuple[str, ...]:
    """Lines of FILE.WHAT.txt, else of the vocabulary beside FILE. Raises UserError unless there are `count`."""
    listed = path.with_suffix(f".{what}.txt")
    found = next((one for one in (listed, path.with_name(vocabulary)) if one.exists()), None)
    if found is None:
        raise UserError(f"{path} has {count:,} {what} without names: put one name a line into {listed}, or bottom-up "
                        f"attention's {vocabulary} beside it")
    names = read_names(found)
    if len(names) != count:
        raise UserError(f"{path} has {count:,} {what} and {found} has {len(names):,} names")
    return names
