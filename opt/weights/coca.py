"""open_clip's CoCa to ours.

    visual.*        tower of the picture and its pooler       settings of open_clip_config.json
    text.*          the decoder's lower half, [CLS], its norm and projection
    text_decoder.*  the upper half: resblocks and cross_attn in turn, and what names the next word

open_clip trained its published weights with a mask that was shifted by one (its issue 549): [CLS] saw one padding token
behind the words instead of itself. Such weights need no such mask to be read: with [CLS] seeing itself they classify as
well (measured there, issue 554), so that there is one way here. open_clip computes the same with `correct_cls_mask`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.tokenizer import Tokenizer
from opt.systems.coca import CoCaConfig, Pooling
from opt.systems.shared.config import Sizes
from opt.weights.importing import Imported
from opt.weights.source import Source

IMAGE, TEXT, CROSS = "visual.transformer.resblocks.", "text.transformer.resblocks.", "text_decoder.cross_attn."
UPPER = "text_decoder.resblocks."
POOLING: dict[bool | str, Pooling] = {True: "shared", "cascade": "cascade", "parallel": "parallel"}
"""Ours, by what open_clip's `attentional_pool` says; the published weights have True."""
KNOWN = {
    "model_cfg": {"embed_dim", "quick_gelu", "custom_text", "vision_cfg", "text_cfg", "multimodal_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "attentional_pool",
                   "attn_pooler_queries", "attn_pooler_heads", "output_tokens"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "embed_cls",
                 "output_tokens"},
    "multimodal_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "dim_head", "n_queries",
                       "attn_pooler_heads"},
}
"""What open_clip says of a CoCa like the published ones; anything else makes another network of it."""


def vocabulary(path: Path) -> Tokenizer:
    """CLIP's byte-pairs."""
    return Tokenizer.from_clip(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors. Raises UserError for networks that are not a CoCa with poolers and a text tower of its own.
    """
    config = _config(source)
    state = _embeddings(source) | _poolers(source, config) | _heads(source)
    for ours, theirs, layers in (("towers.image.stack", IMAGE, config.image.layers),
                                 ("towers.text.stack", TEXT, config.text.layers)):
        for number in range(layers):
            state |= _block(source, f"{ours}.blocks.{number}", f"{theirs}{number}", "self")
    for number in range(config.decoder_layers):
        cross, ours = f"{CROSS}{number}", f"upper.blocks.{2 * number + 1}"
        state |= _block(source, f"upper.blocks.{2 * number}", f"{UPPER}{number}", "self")
        state |= _block(source, ours, cross, "cross") | source.layer(f"{ours}.context_norm", f"{cross}.ln_1_kv")
    return Imported(config, tokenizer, state)


def _config(source: Source) -> CoCaConfig:
    """Sizes of the tensors, with what the settings say that tensors cannot tell."""
    model = _settings(source)
    vision, text, upper = (model[name] for name in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    queries, text_width = source.shape("visual.attn_pool.query")
    patch, places = source.shape("visual.conv1.weight")[-1], source.shape("visual.positional_embedding")[0]
    heads, pooling = text.get("heads", 8), POOLING[vision["attentional_pool"]]
    if upper.get("heads", 8) != heads:
        raise UserError(f"{source.path}: {heads} attention heads in text_cfg and {upper.get('heads', 8)} in "
                        "multimodal_cfg; both must be the same")
    said = source.settings.get("preprocess_cfg", {})
    sight: dict[str, Any] = {"fit": "squeeze" if said.get("resize_mode") == "squash" else "crop"}
    sight |= {ours: tuple(said[theirs]) for ours, theirs in (("mean", "mean"), ("deviation", "std")) if theirs in said}
    return CoCaConfig(
        Sight(size=math.isqrt(places - 1) * patch, patch=patch, **sight),
        image=_sizes(source, IMAGE, vision.get("head_width", 64)), text=_sizes(source, TEXT, text_width // heads),
        decoder_layers=source.layers(UPPER), pooling=pooling, queries=queries - (pooling == "shared"),
        pooler_heads=vision.get("attn_pooler_heads", 8), space=source.shape("text.text_projection")[1],
        text_positions=source.shape("text.positional_embedding")[0] - 1,
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    )


def _settings(source: Source) -> dict[str, Any]:
    """`model_cfg`, with a CoCa's three parts."""
    model = source.settings.get("model_cfg")
    if not isinstance(model, dict) or "multimodal_cfg" not in model:
        raise UserError(f"{source.path} comes without the settings of a CoCa: give the folder it lies in, with its "
                        "open_clip_config.json")
    parts = {"model_cfg": model, **{name: model.get(name, {}) for name in KNOWN if name != "model_cfg"}}
    for name, part in parts.items():
        if other := [key for key, value in part.items() if value and key not in KNOWN[name]]:
            raise UserError(f"{source.path}: {name} has {other[0]} {part[other[0]]!r}, with which it is no CoCa as "
                            "published; choose one with a plain vision transformer and text tower")
    if parts["vision_cfg"].get("attentional_pool") not in POOLING or not parts["text_cfg"].get("embed_cls"):
        raise UserError(f"{source.path}: a CoCa has attentional_pool {', '.join(map(str, POOLING))} in vision_cfg and "
                        "embed_cls in text_cfg; this one has not")
    return {**model, **parts}


def _sizes(source: Source, stem: str, head_width: int) -> Sizes:
    inner, width = source.shape(f"{stem}0.mlp.c_fc.weight")
    return Sizes(width, source.layers(stem), width // head_width, inner)


def _embeddings(source: Source) -> dict[str, Tensor]:
    """[CLS] always stands at the last position of open_clip's, which becomes part of it."""
    position_LD = source.take("text.positional_embedding")
    image, text = "towers.image.embedder", "towers.text.embedder"
    return {
        f"{image}.first": source.take("visual.class_embedding")[None],
        f"{image}.patch.weight": source.take("visual.conv1.weight").flatten(1),
        f"{image}.position.weight": source.take("visual.positional_embedding"),
        f"{text}.first": (source.take("text.cls_emb") + position_LD[-1])[None],
        f"{text}.token.weight": source.take("text.token_embedding.weight"),
        f"{text}.position.weight": position_LD[:-1],
        **source.layer(f"{image}.norm", "visual.ln_pre"),
    }


def _poolers(source: Source, config: CoCaConfig) -> dict[str, Tensor]:
    """open_clip normalises the picture behind a shared pooler, and before two."""
    shared = config.pooling == "shared"
    state = source.layer("poolers.image.norm" if shared else "towers.image.stack.final_norm", "visual.ln_post")
    names = {"generative": "attn_pool", **({} if shared else {"contrastive": "attn_pool_contrastive"})}
    for ours, theirs in ((f"poolers.image.{ours}", f"visual.{theirs}") for ours, theirs in names.items()):
        state |= {f"{ours}.query": source.take(f"{theirs}.query")}
        state |= source.layer(f"{ours}.query_norm", f"{theirs}.ln_q") | source.layer(f"{ours}.token_norm",
                                                                                    f"{theirs}.ln_k")
        state |= _attention(source, f"{ours}.attention", f"{theirs}.attn")
    return state


def _heads(source: Source) -> dict[str, Tensor]:
    return {
        "project.image.linear.weight": source.take("visual.proj").T,
        "project.text.linear.weight": source.take("text.text_projection").T,
        "next_word.weight": source.take("text_decoder.text_projection").T,
        "temperature.log_scale": source.take("logit_scale").reshape(1),
        **source.layer("text_norm", "text.ln_final"), **source.layer("upper.final_norm", "text_decoder.ln_final"),
    }


def _block(source: Source, ours: str, theirs: str, kind: str) -> dict[str, Tensor]:
    """A block with self-attention or cross-attention, and its feed-forward."""
    modules = {f"{kind}_norm": "ln_1", "feed_norm": "ln_2", "feed_forward.0": "mlp.c_fc",
               "feed_forward.2": "mlp.c_proj"}
    state = _attention(source, f"{ours}.{kind}_attention", f"{theirs}.attn")
    for part, module in modules.items():
        state |= source.layer(f"{ours}.{part}", f"{theirs}.{module}")
    return state


def _attention(source: Source, ours: str, theirs: str) -> dict[str, Tensor]:
    """Query, key and value are one matrix where they read the same width, else three; their biases are one."""
    state = source.layer(f"{ours}.output", f"{theirs}.out_proj")
    if source.has(f"{theirs}.in_proj_weight"):
        return state | source.fused(ours, f"{theirs}.in_proj_")
    query, key, value = source.take(f"{theirs}.in_proj_bias").chunk(3)
    matrices = {name: source.take(f"{theirs}.{name}_proj_weight") for name in ("q", "k", "v")}
    return state | {
        f"{ours}.query.weight": matrices["q"], f"{ours}.query.bias": query,
        f"{ours}.key_value.weight": torch.cat([matrices["k"], matrices["v"]]),
        f"{ours}.key_value.bias": torch.cat([key, value]),
    }
