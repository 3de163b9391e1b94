"""BEiT v2's image tokenizer: the authors' `vqkd_encoder_base_*.pth` to the part of it that gives codes.

    .pth --Source--> encoder.*, encode_task_layer.*, quantize.embedding.weight --`load`--> VQKD

The decoder and the teacher of its training stay behind. Nothing in the file is run (opt/weights/state.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from opt.config import UserError
from opt.nn.vqkd import VQKD, VQKDConfig
from opt.weights.source import Source
from opt.weights.vit import HEAD, TIMM, tower

TRAINING = ("decoder.", "decode_task_layer.", "loss", "teacher", "scaling", "quantize.cluster_size",
            "quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted")
"""What names begin with that only training needs."""
CODES, FIRST, LAST = "quantize.embedding.weight", "encode_task_layer.0", "encode_task_layer.2"
LISTED = 8
"""Names that a message lists at most."""


def load(path: Path) -> VQKD:
    """The tokenizer in a file, in evaluation mode. Raises UserError, with names, where it lacks weights or has others.

    Sizes follow from the weights' shapes; heads are 64 wide, as in every published one.
    """
    source = Source.open(path)
    layers = source.layers("encoder.blocks.")
    _require(source, layers)
    try:
        state = _state(source, layers)
        network = VQKD(_sizes(state, layers))
        network.load_state_dict(state)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:  # shapes that do not go together
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not make VQ-KD's encoder ({reason}); copy the file anew") from error
    if unknown := [name for name in source.unused if not name.startswith(TRAINING)]:
        raise UserError(f"{path} holds {_listed(unknown)}, which VQ-KD's encoder has not; give the file of a tokenizer "
                        "that BEiT v2's authors published")
    return network.eval()


def _state(source: Source, layers: int) -> dict[str, Tensor]:
    """All weights by our names."""
    for number in range(layers):  # queries and values have a bias, keys have none
        own = f"encoder.blocks.{number}.attn."
        query, value = (source.tensors.pop(f"{own}{kind}_bias") for kind in "qv")
        source.tensors[f"{own}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    source.rename(lambda name: name.replace("encoder.fc_norm.", f"encoder.{TIMM.norm}."))
    return {
        **tower(source, "encoder.", "embedder", "encoder"), **source.layer("to_code.0", FIRST),
        **source.layer("to_code.2", LAST), "codes.weight": source.take(CODES),
    }


def _sizes(state: dict[str, Tensor], layers: int) -> VQKDConfig:
    codebook, code_width = state["codes.weight"].shape
    width, values = state["embedder.patch.weight"].shape
    if width % HEAD:
        raise ValueError(f"width {width} is no multiple of {HEAD}, a head's")
    return VQKDConfig(
        codebook, code_width, width, layers, width // HEAD, len(state["encoder.blocks.0.feed_forward.0.weight"]),
        math.isqrt(len(state["embedder.position.weight"]) - 1), math.isqrt(values // 3))


def _require(source: Source, layers: int) -> None:
    """Raises UserError that lists what the network has and the file lacks."""
    block = ("attn.q_bias", "attn.v_bias", "attn.qkv.weight", *(
        f"{module}.{kind}" for module in TIMM.block.values() for kind in ("weight", "bias")))
    modules = ("encoder.patch_embed.proj", "encoder.fc_norm", FIRST, LAST)
    wanted = ["encoder.cls_token", "encoder.pos_embed", CODES,
              *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")),
              *(f"encoder.blocks.{number}.{name}" for number in range(max(layers, 1)) for name in block)]
    if missing := [name for name in wanted if not source.has(name)]:
        raise UserError(f"{source.path} holds no {_listed(missing)}, which VQ-KD's encoder has; give the file of a "
                        "tokenizer that BEiT v2's authors published, such as vqkd_encoder_base_decoder_3x768x12_clip")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
