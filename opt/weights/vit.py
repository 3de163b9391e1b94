"""Vision transformers (ViT, arXiv 2010.11929; DeiT, 2012.12877) to the start of a picture tower (`--start vit:PLACE`).

    ViTModel, DeiTModel of transformers | timm's files and authors' .pth --tower--> tensors by our names
                                                                         --begin--> every such tower of a system

Positions of another grid are interpolated. DeiT's distillation token and all heads stay behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, cat, nn

from opt.config import UserError
from opt.nn.embed import PatchEmbedder
from opt.systems.system import System
from opt.weights.places import fill, places, require_settings
from opt.weights.source import Source


@dataclass(frozen=True)
class Layout:
    """Names of a publisher. distilled: DeiT's second token. blocks: what stands before a layer's number; block: modules
    of a layer. own: query, key and value of a layer, or what stands before the one matrix of all."""

    first: str
    distilled: str
    position: str
    patch: str
    norm: str
    blocks: str
    own: tuple[str, ...]
    block: dict[str, str]


TRANSFORMERS = Layout(
    "embeddings.cls_token", "embeddings.distillation_token", "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection", "layernorm", "encoder.layer.",
    tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    {"self_norm": "layernorm_before", "self_attention.output": "attention.output.dense", "feed_norm": "layernorm_after",
     "feed_forward.0": "intermediate.dense", "feed_forward.2": "output.dense"},
)
TIMM = Layout(
    "cls_token", "dist_token", "pos_embed", "patch_embed.proj", "norm", "blocks.", ("attn.qkv.",),
    {"self_norm": "norm1", "self_attention.output": "attn.proj", "feed_norm": "norm2", "feed_forward.0": "mlp.fc1",
     "feed_forward.2": "mlp.fc2"},
)
HEAD = 64
"""Width of an attention head where nobody says: that of every ViT up to large."""


def tower(source: Source, theirs: str, embedder: str, stack: str) -> dict[str, Tensor]:
    """The tensors of a PatchEmbedder and its Stack, whose names begin with `embedder` and `stack`. theirs: what stands
    before the publisher's names, such as "visual_encoder."."""
    layout = TIMM if source.has(theirs + TIMM.first) else TRANSFORMERS
    patch, table = source.layer(f"{embedder}.patch", theirs + layout.patch), source.take(theirs + layout.position)[0]
    if source.has(theirs + layout.distilled):
        table = cat([table[:1], table[2:]])
    state = {
        f"{embedder}.first": source.take(theirs + layout.first).reshape(1, -1),
        f"{embedder}.patch.weight": patch[f"{embedder}.patch.weight"].flatten(1),
        f"{embedder}.patch.bias": patch[f"{embedder}.patch.bias"],
        f"{embedder}.position.weight": table,
        **source.layer(f"{stack}.final_norm", theirs + layout.norm),
    }
    for number in range(source.layers(theirs + layout.blocks)):
        name, own = f"{stack}.blocks.{number}", f"{theirs}{layout.blocks}{number}"
        if len(layout.own) == 1:
            state |= source.fused(f"{name}.self_attention", f"{own}.{layout.own[0]}")
        else:
            query, key, value = (f"{own}.{part}" for part in layout.own)
            state |= source.layer(f"{name}.self_attention.query", query)
            state |= source.layer(f"{name}.self_attention.key_value", key, value)
        for ours, module in layout.block.items():
            state |= source.layer(f"{name}.{ours}", f"{own}.{module}")
    return state


def resized(table: Tensor, grid: int) -> Tensor:
    """A table of positions (1 + g g, D) for a grid of another size, (1 + grid grid, D): bicubic, the first row as it is
    (as ALBEF and BLIP do it)."""
    own = math.isqrt(len(table) - 1)
    if own == grid:
        return table
    square = table[1:].T.reshape(1, -1, own, own)
    spread = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return cat([table[:1], spread.flatten(2)[0].T])


def heads(source: Source, width: int) -> int:
    """Of each layer's attention. Raises UserError where neither settings nor width tell."""
    heads = source.settings.get("num_attention_heads", width // HEAD if width % HEAD == 0 else None)
    if not isinstance(heads, int):
        raise UserError(f"{source.path} does not say how many heads its attention has; give its folder, with a "
                        "config.json that has num_attention_heads")
    return heads


def begin(system: System, source: Source) -> tuple[str, ...]:
    """Fill the towers of pictures of a new system; returns the names of its parts that now hold the weights.

    Raises UserError, with nothing changed, where the system has none, or sizes differ.
    """
    source.rename(lambda name: name.removeprefix("vit.").removeprefix("deit."))
    state: dict[str, Tensor] = {}
    for place in places(system, PatchEmbedder):
        embedder = place.embedder
        assert isinstance(embedder, PatchEmbedder)
        if embedder.patch.bias is None or embedder.position is None or not isinstance(embedder.norm, nn.Identity):
            continue
        found = tower(source, "", place.embedder_name, place.stack_name)
        weights = found[f"{place.embedder_name}.patch.weight"]
        sizes = {"width": len(weights), "layers": source.layers(TIMM.blocks) or source.layers(TRANSFORMERS.blocks),
                 "heads": heads(source, len(weights)),
                 "inner": len(found[f"{place.stack_name}.blocks.0.feed_forward.0.weight"]),
                 "patch": math.isqrt(weights.shape[1] // 3)}
        require_settings(system.config, ("image", "encoder", "sight"), sizes, source.path)
        position = f"{place.embedder_name}.position.weight"
        state |= {**found, position: resized(found[position], math.isqrt(embedder.position.num_embeddings - 1))}
    if not state:
        raise UserError(f"--start vit:{source.path}: system {system.name!r} has no place for a ViT; leave it out")
    return fill(system, state, source.path)
