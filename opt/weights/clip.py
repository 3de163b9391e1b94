"""Published CLIPs to ours: transformers' layout, and the plain one of open_clip and OpenAI.

    CLIPModel: text_model.*, vision_model.*              settings of config.json, pixels of preprocessor_config.json
    CLIP: token_embedding, transformer.*, visual.*       settings of open_clip_config.json, or OpenAI's, in one file

Sizes are those of the tensors; what tensors cannot tell (heads, activation, epsilon) is what the settings say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.tokenizer import Tokenizer
from opt.systems.clip import CLIPConfig
from opt.systems.shared.config import Sizes
from opt.weights.importing import Imported
from opt.weights.source import Source


@dataclass(frozen=True)
class Layout:
    """Where a publisher keeps what is ours. tensors: by our names. modules: with weight and bias. blocks: what stands
    before a layer's number. block: modules of a layer. attention: query and key_value of ours from a layer of theirs.
    """

    tensors: dict[str, str]
    modules: dict[str, str]
    blocks: dict[str, str]
    block: dict[str, str]
    attention: Callable[[Source, str, str], dict[str, Tensor]]


def _three(source: Source, ours: str, theirs: str) -> dict[str, Tensor]:
    """Query, key and value are modules of their own."""
    name = f"{theirs}.self_attn"
    return source.layer(f"{ours}.query", f"{name}.q_proj") | source.layer(
        f"{ours}.key_value", f"{name}.k_proj", f"{name}.v_proj")


def _one(source: Source, ours: str, theirs: str) -> dict[str, Tensor]:
    """Query, key and value are one matrix."""
    return source.fused(ours, f"{theirs}.attn.in_proj_")


TEXT, IMAGE = "towers.text", "towers.image"
TRANSFORMERS = Layout(
    {
        f"{TEXT}.embedder.token.weight": "text_model.embeddings.token_embedding.weight",
        f"{TEXT}.embedder.position.weight": "text_model.embeddings.position_embedding.weight",
        f"{IMAGE}.embedder.first": "vision_model.embeddings.class_embedding",
        f"{IMAGE}.embedder.patch.weight": "vision_model.embeddings.patch_embedding.weight",
        f"{IMAGE}.embedder.position.weight": "vision_model.embeddings.position_embedding.weight",
        "project.text.linear.weight": "text_projection.weight",
        "project.image.linear.weight": "visual_projection.weight",
        "temperature.log_scale": "logit_scale",
    },
    {
        f"{IMAGE}.embedder.norm": "vision_model.pre_layrnorm",  # as it is spelled there
        f"{IMAGE}.stack.final_norm": "vision_model.post_layernorm",
        f"{TEXT}.stack.final_norm": "text_model.final_layer_norm",
    },
    {TEXT: "text_model.encoder.layers.", IMAGE: "vision_model.encoder.layers."},
    {"self_norm": "layer_norm1", "self_attention.output": "self_attn.out_proj", "feed_norm": "layer_norm2",
     "feed_forward.0": "mlp.fc1", "feed_forward.2": "mlp.fc2"},
    _three,
)
PLAIN = Layout(
    {
        f"{TEXT}.embedder.token.weight": "token_embedding.weight",
        f"{TEXT}.embedder.position.weight": "positional_embedding",
        f"{IMAGE}.embedder.first": "visual.class_embedding",
        f"{IMAGE}.embedder.patch.weight": "visual.conv1.weight",
        f"{IMAGE}.embedder.position.weight": "visual.positional_embedding",
        "project.text.linear.weight": "text_projection",
        "project.image.linear.weight": "visual.proj",
        "temperature.log_scale": "logit_scale",
    },
    {
        f"{IMAGE}.embedder.norm": "visual.ln_pre",
        f"{IMAGE}.stack.final_norm": "visual.ln_post",
        f"{TEXT}.stack.final_norm": "ln_final",
    },
    {TEXT: "transformer.resblocks.", IMAGE: "visual.transformer.resblocks."},
    {"self_norm": "ln_1", "self_attention.output": "attn.out_proj", "feed_norm": "ln_2", "feed_forward.0": "mlp.c_fc",
     "feed_forward.2": "mlp.c_proj"},
    _one,
)
OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Numbers that stand among the tensors of OpenAI's own files, and in no others."""
KNOWN = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
"""What open_clip says of a CLIP that is the paper's; anything else makes another network of it."""


def vocabulary(path: Path) -> Tokenizer:
    """CLIP's byte-pairs."""
    return Tokenizer.from_clip(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors of either layout. Raises UserError for networks that are not CLIP's."""
    layout = TRANSFORMERS if source.layers(TRANSFORMERS.blocks[TEXT]) else PLAIN
    state = _state(source, layout)
    if layout is TRANSFORMERS:
        return Imported(_config(state, **_transformers(source)), tokenizer, state)
    for name in ("project.text.linear.weight", "project.image.linear.weight"):
        state[name] = state[name].T
    return Imported(_config(state, **_plain(source, state)), tokenizer, state)


def _state(source: Source, layout: Layout) -> dict[str, Tensor]:
    """All tensors by our names, in our shapes but for the projections."""
    state = {ours: source.take(theirs) for ours, theirs in layout.tensors.items()}
    for ours, theirs in layout.modules.items():
        state |= source.layer(ours, theirs)
    for tower, stem in layout.blocks.items():
        for number in range(source.layers(stem)):
            ours, theirs = f"{tower}.stack.blocks.{number}", f"{stem}{number}"
            state |= layout.attention(source, f"{ours}.self_attention", theirs)
            for part, module in layout.block.items():
                state |= source.layer(f"{ours}.{part}", f"{theirs}.{module}")
    first, patch, scale = f"{IMAGE}.embedder.first", f"{IMAGE}.embedder.patch.weight", "temperature.log_scale"
    return state | {first: state[first].reshape(1, -1), patch: state[patch].flatten(1), scale: state[scale].reshape(1)}


def _config(
    state: dict[str, Tensor], heads: dict[str, int], activation: Any, epsilon: float, sight: dict[str, Any]
) -> CLIPConfig:
    """Sizes of the tensors, with what they cannot tell."""
    places, patch = len(state[f"{IMAGE}.embedder.position.weight"]), state[f"{IMAGE}.embedder.patch.weight"]
    side = math.isqrt(patch.shape[1] // 3)
    sizes = {}
    for tower in (TEXT, IMAGE):
        layers = sum(re.fullmatch(rf"{tower}\.stack\.blocks\.\d+\.self_norm\.bias", name) is not None for name in state)
        inner = len(state[f"{tower}.stack.blocks.0.feed_forward.0.weight"])
        sizes[tower] = Sizes(_width(state, tower), layers, heads[tower], inner)
    return CLIPConfig(
        Sight(size=math.isqrt(places - 1) * side, patch=side, **sight), sizes[IMAGE], sizes[TEXT],
        space=len(state["project.text.linear.weight"]), activation=activation, norm_epsilon=epsilon,
        text_positions=len(state[f"{TEXT}.embedder.position.weight"]),
    )


def _width(state: dict[str, Tensor], tower: str) -> int:
    return state[f"{tower}.embedder.position.weight"].shape[1]


def _transformers(source: Source) -> dict[str, Any]:
    """What config.json and preprocessor_config.json say; what they leave out is transformers' default."""
    if (kind := source.settings.get("model_type")) != "clip":
        raise UserError(f"{source.path}: model_type is {kind!r}, expected 'clip'; give the folder of a CLIP, with its "
                        "config.json")
    said = source.settings
    text, vision = ({**(said.get(f"{part}_config") or {}), **(said.get(f"{part}_config_dict") or {})}
                    for part in ("text", "vision"))  # older files have either, or both
    same = {}
    for name, usual in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        same[name] = text.get(name, usual)
        if vision.get(name, usual) != same[name]:
            raise UserError(f"{source.path}: {name} is {same[name]!r} for text and {vision.get(name, usual)!r} for "
                            "pictures; both must be the same")
    if same["hidden_act"] not in ("gelu", "quick_gelu"):
        raise UserError(f"{source.path}: hidden_act is {same['hidden_act']!r}, expected gelu or quick_gelu")
    heads = {TEXT: text.get("num_attention_heads", 8), IMAGE: vision.get("num_attention_heads", 12)}
    sight = {ours: tuple(source.preprocessing[theirs])
             for ours, theirs in (("mean", "image_mean"), ("deviation", "image_std")) if theirs in source.preprocessing}
    return {"heads": heads, "activation": same["hidden_act"], "epsilon": same["layer_norm_eps"],
            "sight": {"fit": "crop", **sight}}


def _plain(source: Source, state: dict[str, Tensor]) -> dict[str, Any]:
    """What open_clip_config.json says; OpenAI's own files say all by being OpenAI's."""
    model = source.settings.get("model_cfg")
    if model is None and not all(source.has(name) for name in OPENAI):
        raise UserError(f"{source.path} does not say whether its feed-forwards compute gelu or quick_gelu: give the "
                        "folder it lies in, with its open_clip_config.json")
    model = {"quick_gelu": True} if model is None else model
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for name, part in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        if other := [key for key, value in part.items() if value and key not in KNOWN[name]]:
            raise UserError(f"{source.path}: {name} has {other[0]} {part[other[0]]!r}, with which it is no CLIP as "
                            "published; choose a CLIP with a plain vision transformer and text tower")
    heads = {TEXT: text.get("heads", _width(state, TEXT) // 64),
             IMAGE: _width(state, IMAGE) // vision.get("head_width", 64)}
    said = source.settings.get("preprocess_cfg", {})
    sight = {ours: tuple(said[theirs]) for ours, theirs in (("mean", "mean"), ("deviation", "std")) if theirs in said}
    fit = "squeeze" if said.get("resize_mode") == "squash" else "crop"
    return {"heads": heads, "activation": "quick_gelu" if model.get("quick_gelu") else "gelu", "epsilon": 1e-5,
            "sight": {"fit": fit, **sight}}
