"""Objects of spoken scenes found by boxes: a pretrained BEiT-3 as a detector's backbone, against the same from nothing.

    python benchmarks/detection.py --model runs/systems/runs/beit3.tiny-0-5min/model --scenes runs/systems/scenes
        [--minutes 3] [--size 64] [--train 2000] [--test 300]

Both are torchvision's Faster R-CNN over a feature pyramid (opt/nn/pyramid.py), one thread and so many minutes of CPU
time each: the pretrained one is timed, and the other takes as many steps. Classes are the shapes. Box AP as COCO counts
it (pycocotools), over IoU from 0.5 to 0.95, on held-out scenes. The paper's figures on COCO are out of reach here.

Prints one JSON line: `ap` and `ap50` of "pretrained" and "scratch", and their steps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from feature_extract.sources.scene_drawing import SHAPES
from opt.checkpoint import from_pretrained
from opt.config import UserError
from opt.recipe import OptimConfig
from opt.systems.beit3 import BEiT3
from opt.systems.system import build
from pretrain.optim import learning_rate

KINDS = tuple(SHAPES)
BATCH, MEASURED = 8, 4
STRIDES = (4, 8)
ANCHORS = (0.12, 0.2)
"""Sides of the boxes that the maps propose, over the side of a picture."""
RATES = OptimConfig(learning_rate=1e-3)
CLIP = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True, help="what `opt scenes` wrote, with a test part")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pretrained = from_pretrained(given.model)
    if not isinstance(pretrained, BEiT3):
        raise UserError(f"{given.model} holds a model of system {pretrained.name!r}; give one of beit3")
    torch.manual_seed(0)
    scratch = build("beit3", pretrained.config, pretrained.tokenizer, pretrained.facts)
    assert isinstance(scratch, BEiT3)
    seen = [load(given.scenes, split, count, given.size) for split, count in
            (("train", given.train), ("test", given.test))]
    steps, found = 0, {}
    for name, system in (("pretrained", pretrained), ("scratch", scratch)):
        model = detector(system, given.size)
        steps = train(model, *seen[0], given.minutes, steps)
        found[name] = average_precision(detections(model, seen[1][0]), seen[1][1])
    print(json.dumps({**found, "steps": steps, "minutes": given.minutes, "size": given.size}))


def detector(system: BEiT3, size: int) -> FasterRCNN:
    """Faster R-CNN on the system's picture tower; heads drawn alike whatever the tower holds."""
    torch.manual_seed(1)
    backbone = system.pyramid(channels=64, strides=STRIDES)
    for parameter in backbone.parameters():
        parameter.requires_grad_()
    return FasterRCNN(
        backbone, 1 + len(KINDS), min_size=size, max_size=2 * size, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(
            tuple((round(share * size),) for share in ANCHORS), ((1.0,),) * len(ANCHORS)),
        rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=150, rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50, rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign([str(number) for number in range(len(STRIDES))], 5, 2),
        box_batch_size_per_image=64, box_detections_per_img=20,
    )


def load(scenes: Path, split: str, count: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures (3, size, size) from 0 to 1, boxes in pixels and classes from 1 on. Raises UserError for too few."""
    lines = (scenes / f"{split}_scenes.jsonl").read_text().splitlines()[:count]
    if len(lines) < count:
        raise UserError(f"{scenes} holds {len(lines)} {split} scenes, not {count}")
    pictures, targets = [], []
    for scene in map(json.loads, lines):
        with Image.open(scenes / "images" / f"{scene['image_id']}.jpg") as opened:
            pixels = np.asarray(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).copy()
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        targets.append({"boxes": torch.tensor([thing["box"] for thing in scene["objects"]]) * size,
                        "labels": torch.tensor([KINDS.index(thing["shape"]) + 1 for thing in scene["objects"]])})
    return pictures, targets


def train(model: FasterRCNN, pictures: list[Tensor], targets: list[dict[str, Tensor]], minutes: float, steps: int
          ) -> int:
    """AdamW for so many steps, or as many as take `minutes` of CPU time where `steps` is 0. Returns the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    draw, model = np.random.default_rng(0), model.train()
    began, step = time.process_time(), 0
    fresh = copy.deepcopy(model.state_dict()) if not steps else None
    while not steps or step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps or 1000, RATES)
        rows = draw.choice(len(pictures), BATCH, replace=False)
        losses = model([pictures[row] for row in rows], [targets[row] for row in rows])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        if fresh is not None and step == MEASURED:  # measured; now in earnest, from the beginning
            model.load_state_dict(fresh)
            return train(model, pictures, targets, minutes,
                         max(round(60 * minutes * MEASURED / (time.process_time() - began)), 1))
    return step


@torch.inference_mode()
def detections(model: FasterRCNN, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
    """Boxes, labels and scores of each picture."""
    model.eval()
    return [found for start in range(0, len(pictures), BATCH) for found in model(pictures[start : start + BATCH])]


def average_precision(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """Box AP as COCO has it: over IoU from 0.5 to 0.95, and at 0.5."""
    truth, guesses = list[dict[str, Any]](), list[dict[str, Any]]()
    for image, (guess, target) in enumerate(zip(found, targets, strict=True), 1):
        for box, label in zip(_corner_and_size(target["boxes"]), target["labels"].tolist(), strict=True):
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": label, "bbox": box,
                          "area": box[2] * box[3], "iscrowd": 0})
        for box, label, score in zip(_corner_and_size(guess["boxes"]), guess["labels"].tolist(),
                                     guess["scores"].tolist(), strict=True):
            guesses.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    if not guesses:
        return {"ap": 0.0, "ap50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it says much of each step
        known = COCO()
        known.dataset = {"images": [{"id": image} for image in range(1, len(targets) + 1)], "annotations": truth,
                         "categories": [{"id": number} for number in range(1, len(KINDS) + 1)], "info": {}}
        known.createIndex()
        judged = COCOeval(known, known.loadRes(guesses), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {"ap": round(float(judged.stats[0]), 4), "ap50": round(float(judged.stats[1]), 4)}


def _corner_and_size(boxes: Tensor) -> list[list[float]]:
    """Corners x1 y1 x2 y2 as x y width height."""
    low, high = boxes.split(2, dim=1)
    return torch.cat([low, high - low], dim=1).tolist()


if __name__ == "__main__":
    main()
