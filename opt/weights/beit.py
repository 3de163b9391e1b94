"""BEiT (arXiv 2106.08254) and BEiT v2 (2208.06366) to what a VLMo sees pictures with (`--start vit:PLACE`), as VLMo's
authors begin theirs (arXiv 2111.02358, section 3.3).

    BeitModel of transformers | the authors' and timm's .pth --> attention, which all modalities share; the image expert
    a table of relative positions, one for all layers or one each --> the rows that pictures own, for every layer

A ViT fits a VLMo of absolute positions: it has no factors of residual sums, which are 1 then. Class heads stay behind.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from opt.config import UserError
from opt.nn.embed import PatchEmbedder
from opt.nn.multiway import SHARED, MultiwayBlock
from opt.nn.relative import resized
from opt.systems.system import System
from opt.systems.vlmo import VLMo
from opt.weights import vit
from opt.weights.places import fill, require_settings
from opt.weights.source import Source
from opt.weights.vit import TIMM, TRANSFORMERS, Layout

TABLE = "relative_position_bias_table"
TABLES = {TIMM.blocks: ("rel_pos_bias.", "attn."),
          TRANSFORMERS.blocks: ("encoder.relative_position_bias.", "attention.attention.relative_position_bias.")}
"""What stands before it where all layers share one, and in a layer with its own."""
SCALES = {"self_scale": ("gamma_1", "lambda_1"), "feed_scale": ("gamma_2", "lambda_2")}
"""Factors of a layer's residual sums: the authors' names, and transformers'."""
FEED = {"feed_norm": ("feed_norm", ""), "feed_forward.0": ("feed_forward", ".0"),
        "feed_forward.2": ("feed_forward", ".3")}
"""Modules of a ViT's layer by our names, and of a multiway block: before and behind the expert."""


def begin(system: System, source: Source) -> tuple[str, ...]:
    """Fill what a new VLMo sees with; returns the names of its parts that now hold the weights.

    Raises UserError, with nothing changed, where the system has no place for it, or sizes or positions differ.
    """
    if not isinstance(system, VLMo):
        raise UserError(f"--start vit:{source.path}: system {system.name!r} has no place for a ViT or a BEiT; leave it "
                        "out")
    source.rename(lambda name: name.removeprefix("beit.").removeprefix("vit."))
    layout = TIMM if source.has(TIMM.first) else TRANSFORMERS
    state = _embedder(system, source, layout)
    layers = source.layers(layout.blocks)
    tables = _tables(source, layout, layers)
    inner, width = source.shape(f"{layout.blocks}0.{layout.block['feed_forward.0']}.weight")
    heads = tables[0].shape[1] if tables else vit.heads(source, width)
    patch = math.isqrt(state["embedders.image.patch.weight"].shape[1] // 3)
    require_settings(system.config, ("encoder", "sight"), {
        "width": width, "layers": layers, "heads": heads, "inner": inner, "patch": patch,
        "positions": "relative" if tables else "absolute",
    }, source.path)  # fmt: skip
    for number, block in enumerate(system.stack.blocks):
        expert = cast(MultiwayBlock, block).feed_forward.serves.get("image", SHARED)
        state |= layer(source, f"{layout.blocks}{number}", f"stack.blocks.{number}", layout)
        for name, (before, behind) in FEED.items():
            state |= source.layer(f"stack.blocks.{number}.{before}.each.{expert}{behind}",
                                  f"{layout.blocks}{number}.{layout.block[name]}")
    if source.has(f"{layout.norm}.weight"):  # where classes are told by the mean of patches there is none
        state |= source.layer(f"stack.final_norm.each.{SHARED}", layout.norm)
    if tables:
        grid = system.config.sight.grid
        state["positions.table.image"] = torch.cat([_of_grid(table, grid) for table in tables], dim=1)
    return fill(system, state, source.path)


def layer(source: Source, theirs: str, ours: str, layout: Layout = TIMM) -> dict[str, Tensor]:
    """Of a multiway block what all modalities share: attention, its norm, the factors of both sums. theirs, ours: what
    names begin with, up to the layer's number. Keys have no bias in BEiT: ours are 0."""
    weight, bias = _joined(source, theirs, layout)
    query, key_value = f"{ours}.self_attention.query.each.{SHARED}", f"{ours}.self_attention.key_value.each.{SHARED}"
    third = len(weight) // 3
    state = {f"{query}.weight": weight[:third], f"{key_value}.weight": weight[third:], f"{query}.bias": bias[:third],
             f"{key_value}.bias": bias[third:]}
    state |= source.layer(f"{ours}.self_attention.output.each.{SHARED}",
                          f"{theirs}.{layout.block['self_attention.output']}")
    state |= source.layer(f"{ours}.self_norm.each.{SHARED}", f"{theirs}.{layout.block['self_norm']}")
    for name, kinds in SCALES.items():
        found = [f"{theirs}.{kind}" for kind in kinds if source.has(f"{theirs}.{kind}")]
        state[f"{ours}.{name}"] = source.take(found[0]) if found else torch.ones(weight.shape[1])
    return state


def _joined(source: Source, theirs: str, layout: Layout) -> tuple[Tensor, Tensor]:
    """Query, key and value of a layer one below the other: (3 D, D), (3 D,)."""
    if layout is TRANSFORMERS:
        names = [f"{theirs}.{name}" for name in layout.own]
        weights = [source.take(f"{name}.weight") for name in names]
        return torch.cat(weights), torch.cat([
            source.take(f"{name}.bias") if source.has(f"{name}.bias") else torch.zeros(len(weight))
            for name, weight in zip(names, weights, strict=True)])
    stem = f"{theirs}.attn."
    weight = source.take(f"{stem}qkv.weight")
    if source.has(f"{stem}qkv.bias"):
        return weight, source.take(f"{stem}qkv.bias")
    query, value = source.take(f"{stem}q_bias"), source.take(f"{stem}v_bias")
    return weight, torch.cat([query, torch.zeros_like(query), value])


def _embedder(system: VLMo, source: Source, layout: Layout) -> dict[str, Tensor]:
    """Class token and patches; the mask and absolute places where both have them."""
    embedder, stem = cast(PatchEmbedder, system.embedders["image"]), "embedders.image"
    patch = source.layer(f"{stem}.patch", layout.patch)
    state = {f"{stem}.first": source.take(layout.first).reshape(1, -1),
             f"{stem}.patch.weight": patch[f"{stem}.patch.weight"].flatten(1),
             f"{stem}.patch.bias": patch[f"{stem}.patch.bias"]}
    mask = layout.first.replace("cls", "mask")
    if embedder.mask is not None and source.has(mask):
        state[f"{stem}.mask"] = source.take(mask).reshape(-1)
    if embedder.position is not None and source.has(layout.position):
        state[f"{stem}.position.weight"] = vit.resized(source.take(layout.position)[0], system.config.sight.grid)
    return state


def _tables(source: Source, layout: Layout, layers: int) -> list[Tensor]:
    """Relative positions of each layer, (rows, H); none where places are absolute."""
    shared, own = TABLES[layout.blocks]
    if source.has(f"{shared}{TABLE}"):
        return [source.take(f"{shared}{TABLE}")] * layers
    if source.has(f"{layout.blocks}0.{own}{TABLE}"):
        return [source.take(f"{layout.blocks}{number}.{own}{TABLE}") for number in range(layers)]
    return []


def _of_grid(table_RH: Tensor, grid: int) -> Tensor:
    """Rows for patches and the class token's three, for a grid of another size."""
    own = (math.isqrt(len(table_RH) - 3) + 1) // 2
    if own == grid:
        return table_RH
    return torch.cat([resized(table_RH[:-3], own, grid), table_RH[-3:]])
