"""Checkpoints of detectron2's C4 Faster R-CNN, by short names: .pkl and .pth as detectron2 writes them, .safetensors.

    file --read_state--> detectron2's names --read--> stem.* res2.* ... rpn.* cls_score.* bbox_pred.* attributes.*

Three publishers name the attribute head in three ways; here it has one: attributes.obj_embed, .fc, .score.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from opt.config import UserError
from opt.weights.state import read_state

PREFIXES = {
    "proposal_generator.anchor_generator.cell_anchors.0": "anchors",
    "proposal_generator.rpn_head.": "rpn.",
    "roi_heads.attribute_predictor.": "attributes.",
    "roi_heads.box_predictor.": "",
    "roi_heads.": "",
    "backbone.": "",
}
"""detectron2's names begin so; the first that fits is replaced."""
ATTRIBUTES = {
    r"^(cls_embedding|cls_embed)\.": "attributes.obj_embed.",
    r"^(fc_attr|attr_linear1|attributes\.fc\.0)\.": "attributes.fc.",
    r"^(attr_score|attr_linear2|attributes\.attr_score)\.": "attributes.score.",
}
MOVED = {r"^res5\.0\.norm\.": "map_norm.", r"^res5_bn\.": "last_norm."}
"""Norms of the preactivated network that stand outside of its blocks: before pooling, and behind the last block."""
UNUSED = re.compile(r"num_batches_tracked$|^mask_head\.|^keypoint_head\.|cell_anchors")
NEEDED = ("stem.conv1.weight", "rpn.conv.weight", "res5.0.conv1.weight", "cls_score.weight", "bbox_pred.weight")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by short names, in float32. Raises UserError when it is none, or not of kind C4."""
    state = {_short(name): tensor.float() for name, tensor in read_state(path).items()}
    if missing := [name for name in NEEDED if name not in state]:
        raise UserError(f"{path} holds no {missing[0]}: it is not a C4 Faster R-CNN as detectron2 names it (a network "
                        "with a feature pyramid, or of torchvision, is another)")
    state = {name: tensor for name, tensor in state.items() if not UNUSED.search(name)}
    return _with_statistics(state)


def _short(name: str) -> str:
    for prefix, short in PREFIXES.items():
        if name.startswith(prefix):
            name = short + name.removeprefix(prefix)
            break
    for pattern, short in {**ATTRIBUTES, **MOVED}.items():
        name = re.sub(pattern, short, name)
    return name


def _with_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean 0 and variance 1 for norms that have none: Caffe2's files fold them into weight and bias."""
    for name in [name for name in state if name.endswith("norm.bias")]:
        for statistic, value in (("running_mean", torch.zeros), ("running_var", torch.ones)):
            state.setdefault(name.replace("bias", statistic), value(len(state[name])))
    return state
