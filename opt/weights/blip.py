"""Published BLIPs to ours: transformers' layout, and the authors' .pth files.

    vision_model.*, text_encoder.* | text_model.*, text_decoder.*         transformers; settings of config.json
    visual_encoder.*, text_encoder.*, text_decoder.*, *_m, *_queue        the authors': one file, and no settings

A checkpoint may have the text network as a reader (text_encoder), as a writer (text_decoder), or as both, which then
share all but self-attention. What it lacks is new: a captioner has no reader, a filter no writer. Without momentum
parts the twin begins as a copy of what there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.tokenizer import Tokenizer
from opt.objectives.contrastive import NO_PICTURE
from opt.systems.blip import BLIPConfig
from opt.systems.shared.config import Sizes
from opt.weights.importing import Imported
from opt.weights.source import Source


@dataclass(frozen=True)
class Pictures:
    """What a publisher calls the parts of the tower for pictures, below the tower's own name."""

    first: str
    position: str
    patch: str
    norm: str
    blocks: str
    block: dict[str, str]
    attention: str


TRANSFORMERS = Pictures(
    "embeddings.class_embedding", "embeddings.position_embedding", "embeddings.patch_embedding", "post_layernorm",
    "encoder.layers.",
    {"self_norm": "layer_norm1", "self_attention.output": "self_attn.projection", "feed_norm": "layer_norm2",
     "feed_forward.0": "mlp.fc1", "feed_forward.2": "mlp.fc2"},
    "self_attn.qkv.",
)  # fmt: skip
AUTHORS = Pictures(
    "cls_token", "pos_embed", "patch_embed.proj", "norm", "blocks.",
    {"self_norm": "norm1", "self_attention.output": "attn.proj", "feed_norm": "norm2", "feed_forward.0": "mlp.fc1",
     "feed_forward.2": "mlp.fc2"},
    "attn.qkv.",
)  # fmt: skip
SHARED = {
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_norm": ("crossattention.output.LayerNorm",),
    "feed_forward.0": ("intermediate.dense",),
    "feed_forward.2": ("output.dense",),
    "feed_norm": ("output.LayerNorm",),
}
"""Modules of a layer that reader and writer share: ours, and those whose weights lie in them, one below the other."""
OWN = {
    "attention.query": ("attention.self.query",),
    "attention.key_value": ("attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "norm": ("attention.output.LayerNorm",),
}
"""Modules of a layer that each has of its own; ours begin with "self_" or "writing_"."""
READERS, WRITER, WORDS = ("text_encoder.", "text_model."), "text_decoder.bert.", "text_decoder.cls.predictions"
TEXT, IMAGE = "towers.text", "towers.image"
PROMPT = "a picture of "
"""What the authors' captioners were tuned to go on from."""


def vocabulary(path: Path) -> Tokenizer:
    """BERT's words, with [DEC] and [ENC]."""
    return Tokenizer.from_blip(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors of either layout. Raises UserError for networks that are not BLIP's."""
    reader = next((stem for stem in READERS if _layers(source, stem)), None)
    writer = WRITER if _layers(source, WRITER) else None
    if reader is None and writer is None:
        raise UserError(f"{source.path} holds neither text_encoder nor text_decoder; give a BLIP")
    theirs = bool(source.layers("vision_model.encoder.layers."))
    said = _transformers(source) if theirs else _authors(source)
    online = _pictures(source, "vision_model" if theirs else "visual_encoder", TRANSFORMERS if theirs else AUTHORS)
    online |= _words(source, reader, writer) | _projections(source, "")
    twin = dict(online)
    if source.has("vision_proj_m.weight"):
        twin |= _pictures(source, "visual_encoder_m", AUTHORS) | _projections(source, "_m")
        twin |= _words(source, "text_encoder_m.", None)
    state = {f"encoders.{name}": tensor for name, tensor in online.items()}
    state |= {f"twin.copy.{name}": tensor for name, tensor in twin.items()} | _heads(source) | _memory(source)
    layers = _layers(source, reader or WRITER)
    return Imported(_config(state, layers, writer is not None and reader is None, **said), tokenizer, state,
                    fresh=_fresh(state, layers))


def _layers(source: Source, stem: str) -> int:
    return source.layers(f"{stem}encoder.layer.")


def _pictures(source: Source, stem: str, names: Pictures) -> dict[str, Tensor]:
    """The tower for pictures."""
    embedder = f"{IMAGE}.embedder"
    patch = source.layer(f"{embedder}.patch", f"{stem}.{names.patch}")
    state = patch | source.layer(f"{IMAGE}.stack.final_norm", f"{stem}.{names.norm}") | {
        f"{embedder}.first": source.take(f"{stem}.{names.first}").flatten(0, 1),
        f"{embedder}.position.weight": source.take(f"{stem}.{names.position}").flatten(0, 1),
        f"{embedder}.patch.weight": patch[f"{embedder}.patch.weight"].flatten(1),
    }
    for number in range(source.layers(f"{stem}.{names.blocks}")):
        ours, theirs = f"{IMAGE}.stack.blocks.{number}", f"{stem}.{names.blocks}{number}"
        state |= source.fused(f"{ours}.self_attention", f"{theirs}.{names.attention}")
        for part, module in names.block.items():
            state |= source.layer(f"{ours}.{part}", f"{theirs}.{module}")
    return state


def _words(source: Source, reader: str | None, writer: str | None) -> dict[str, Tensor]:
    """The text network. Raises UserError where reader and writer do not share what BLIP's share."""
    both = [_shared(source, stem) for stem in (reader, writer) if stem is not None]
    for name, tensor in both[0].items():
        if not torch.equal(tensor, both[-1][name]):
            raise UserError(f"{source.path}: text_encoder and text_decoder differ in what belongs to {name}, which "
                            "BLIP's share (a model for questions has two networks); choose another checkpoint")
    state = both[0]
    for stem, function in ((reader, "self"), (writer, "writing")):
        for number in range(_layers(source, stem)) if stem else ():
            for part, modules in OWN.items():
                state |= source.layer(f"{TEXT}.stack.blocks.{number}.{function}_{part}",
                                      *(f"{stem}encoder.layer.{number}.{module}" for module in modules))
    return state


def _shared(source: Source, stem: str) -> dict[str, Tensor]:
    """Embedded words, and what all functions share of each layer."""
    embedder, words = f"{TEXT}.embedder", source.take(f"{stem}embeddings.word_embeddings.weight")
    state = source.layer(f"{embedder}.norm", f"{stem}embeddings.LayerNorm") | {
        f"{embedder}.token.weight": words,
        f"{embedder}.modality": torch.zeros_like(words[0]),  # all tokens are of one type, which has no vector
        f"{embedder}.position.weight": source.take(f"{stem}embeddings.position_embeddings.weight"),
    }
    for number in range(_layers(source, stem)):
        for part, modules in SHARED.items():
            state |= source.layer(f"{TEXT}.stack.blocks.{number}.{part}",
                                  *(f"{stem}encoder.layer.{number}.{module}" for module in modules))
    return state


def _projections(source: Source, twin: str) -> dict[str, Tensor]:
    """Into the shared space, where the checkpoint has it. BlipModel's own (behind a pooler) are of another network."""
    state: dict[str, Tensor] = {}
    for name, theirs in (("image", f"vision_proj{twin}"), ("text", f"text_proj{twin}")):
        if source.has(f"{theirs}.weight"):
            state |= source.layer(f"project.{name}.linear", theirs)
    return state


def _heads(source: Source) -> dict[str, Tensor]:
    """Matching and words, where the checkpoint has them. Raises UserError for a head with word vectors of its own."""
    state = source.layer("match_head", "itm_head") if source.has("itm_head.weight") else {}
    if not source.has(f"{WORDS}.transform.dense.weight"):
        return state
    for name in (f"{WORDS}.decoder.weight", f"{WORDS}.decoder.bias"):
        other = f"{WORDS}.bias" if name.endswith("bias") else f"{WRITER}embeddings.word_embeddings.weight"
        if source.has(name) and source.has(other) and not torch.equal(source.take(name), source.take(other)):
            raise UserError(f"{source.path}: {name} is not {other}, which BLIP's is; choose another checkpoint")
    bias = f"{WORDS}.bias" if source.has(f"{WORDS}.bias") else f"{WORDS}.decoder.bias"
    return (state | {"word_head.bias": source.take(bias)}
            | source.layer("word_head.transform", f"{WORDS}.transform.dense")
            | source.layer("word_head.norm", f"{WORDS}.transform.LayerNorm"))


def _memory(source: Source) -> dict[str, Tensor]:
    """Temperature and queues, where the checkpoint has them. Which picture an entry shows is not known any more."""
    state: dict[str, Tensor] = {}
    if source.has("temp"):
        state["contrast.temperature.log_scale"] = -source.take("temp").reshape(1).log()
    if source.has("image_queue"):
        ring, entries = "contrast.ring", source.shape("image_queue")[1]
        place = next(name for name in ("queue_ptr", "ptr_queue") if source.has(name))
        state |= {f"{ring}.{name}": source.take(f"{name}_queue").T for name in ("image", "text")}
        state |= {f"{ring}.has_{name}": torch.ones(entries, dtype=torch.bool) for name in ("image", "text")}
        state[f"{ring}.picture"] = torch.full((entries,), NO_PICTURE)
        state[f"{ring}.place"] = source.take(place).reshape(())
    return state


def _fresh(state: Mapping[str, Tensor], layers: int) -> tuple[str, ...]:
    """Parts of ours that a checkpoint may lack, and this one does."""
    parts = ["match_head", "word_head", "contrast.temperature", "contrast.ring"]
    for stem in ("encoders", "twin.copy"):
        parts.append(f"{stem}.project")
        parts += [f"{stem}.{TEXT}.stack.blocks.{number}.{function}_" for number in range(layers)
                  for function in ("self", "writing")]
    return tuple(part for part in parts if not any(name.startswith(part) for name in state))


def _config(
    state: dict[str, Tensor], layers: int, captioner: bool, heads: dict[str, int | None], image_epsilon: float,
    sight: dict[str, Any],
) -> BLIPConfig:
    """Sizes of the tensors, with what they cannot tell. A captioner goes on from the authors' prompt."""
    tables = {tower: state[f"encoders.{tower}.embedder.position.weight"] for tower in (TEXT, IMAGE)}
    side = math.isqrt(state[f"encoders.{IMAGE}.embedder.patch.weight"].shape[1] // 3)
    stem = f"encoders.{IMAGE}.stack.blocks."
    depths = {TEXT: layers, IMAGE: sum(name.startswith(stem) and name.endswith("self_norm.bias") for name in state)}
    sizes = {}
    for tower, depth in depths.items():
        inner, width = state[f"encoders.{tower}.stack.blocks.0.feed_forward.0.weight"].shape
        sizes[tower] = Sizes(width, depth, heads[tower] or width // 64, inner)
    projected, queue = state.get("encoders.project.text.linear.weight"), state.get("contrast.ring.text")
    return BLIPConfig(
        Sight(size=math.isqrt(len(tables[IMAGE]) - 1) * side, patch=side, **sight), sizes[IMAGE], sizes[TEXT],
        space=BLIPConfig.space if projected is None else len(projected), text_positions=len(tables[TEXT]),
        image_epsilon=image_epsilon, ring_rows=BLIPConfig.ring_rows if queue is None else len(queue),
        prompt=PROMPT if captioner else "",
    )  # fmt: skip


def _transformers(source: Source) -> dict[str, Any]:
    """What config.json and preprocessor_config.json say; what they leave out is transformers' default."""
    if (kind := source.settings.get("model_type")) != "blip":
        raise UserError(f"{source.path}: model_type is {kind!r}, expected 'blip'; give the folder of a BLIP, with its "
                        "config.json")
    text, vision = source.settings.get("text_config") or {}, source.settings.get("vision_config") or {}
    rules = (("text", text, "hidden_act", "gelu"), ("pictures", vision, "hidden_act", "gelu"),
             ("text", text, "layer_norm_eps", 1e-12))
    for part, settings, name, wanted in rules:
        if (value := settings.get(name, wanted)) != wanted:
            raise UserError(f"{source.path}: {name} is {value!r} for {part}, BLIP's is {wanted!r}; choose another "
                            "checkpoint")
    said = source.preprocessing
    sight = {ours: tuple(said[theirs]) for ours, theirs in (("mean", "image_mean"), ("deviation", "image_std"))
             if theirs in said}
    heads = {TEXT: text.get("num_attention_heads", 8), IMAGE: vision.get("num_attention_heads", 12)}
    return {"heads": heads, "image_epsilon": vision.get("layer_norm_eps", 1e-5), "sight": sight}


def _authors(source: Source) -> dict[str, Any]:
    """The authors' code has heads of 64 and its own epsilon."""
    return {"heads": {TEXT: None, IMAGE: None}, "image_epsilon": 1e-6, "sight": {}}
