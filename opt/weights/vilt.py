"""Published ViLTs to ours: the layout of transformers (ViltModel and the models that have one).

    vilt.embeddings.*, vilt.encoder.layer.*, vilt.pooler.*    words, patches, encoder, pooler
    mlm_score.*                                               the head of hidden words, where there is one
    rank_output.*                                             matching by one number: log-odds, so that "no match" is 0

Sizes are those of the tensors; what tensors cannot tell (heads, epsilon) is what config.json says.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.pixels import Sight
from opt.data.tokenizer import Tokenizer
from opt.systems.shared.config import Sizes
from opt.systems.vilt import ViLTConfig
from opt.weights.importing import Imported
from opt.weights.source import Source

WORDS = "embeddings.text_embeddings"
LAYER = "encoder.layer."
BLOCK = {
    "self_norm": ("layernorm_before",),
    "self_attention.query": ("attention.attention.query",),
    "self_attention.key_value": ("attention.attention.key", "attention.attention.value"),
    "self_attention.output": ("attention.output.dense",),
    "feed_norm": ("layernorm_after",),
    "feed_forward.0": ("intermediate.dense",),
    "feed_forward.2": ("output.dense",),
}
"""Modules of our block, and those of theirs whose weights lie in them, one below the other."""
LONGEST = 1333 / 800
"""The longest side of a picture over the shorter one's size."""


def vocabulary(path: Path) -> Tokenizer:
    """A BERT's words."""
    return Tokenizer.from_vocab(path) if path.is_file() else Tokenizer.from_bert(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors. Raises UserError for networks that are not ViLT's."""
    settings = source.settings
    for name, wanted, usual in (("model_type", "vilt", None), ("hidden_act", "gelu", "gelu")):
        if (value := settings.get(name, usual)) != wanted:
            raise UserError(f"{source.path}: {name} is {value!r}, expected {wanted!r}; give the folder of a ViLT, with "
                            "its config.json")
    source.rename(lambda name: name.removeprefix("vilt."))
    state = {**_embeddings(source), **_encoder(source), **_word_head(source), **_match_head(source)}
    fresh = tuple(f"{head}." for head in ("word_head", "match_head") if f"{head}.bias" not in state)
    longer = tuple(name for name in ("text.token.weight", "word_head.bias") if name in state)
    return Imported(_config(source, state), tokenizer, state, fresh, longer)


def _config(source: Source, state: dict[str, Tensor]) -> ViLTConfig:
    """Sizes of the tensors, with what they cannot tell."""
    width, side = len(state["text.modality"]), math.isqrt(state["image.patch.weight"].shape[1] // 3)
    size = math.isqrt(len(state["image.position.weight"]) - 1) * side
    said = source.preprocessing
    mean, deviation = (tuple(said.get(name, (0.5, 0.5, 0.5))) for name in ("image_mean", "image_std"))
    return ViLTConfig(
        Sight(size, side, "keep", int(LONGEST * size), mean=mean, deviation=deviation),
        Sizes(width, source.layers(LAYER), source.settings.get("num_attention_heads", 12),
              len(state["encoder.blocks.0.feed_forward.0.weight"])),
        norm_epsilon=source.settings.get("layer_norm_eps", 1e-12),
        text_positions=len(state["text.position.weight"]),
    )


def _embeddings(source: Source) -> dict[str, Tensor]:
    """Words by token type 0, a picture's patches by modality type 1; a second picture's type (NLVR2) stays behind."""
    return {
        "text.token.weight": source.take(f"{WORDS}.word_embeddings.weight"),
        "text.position.weight": source.take(f"{WORDS}.position_embeddings.weight"),
        "text.modality": source.take(f"{WORDS}.token_type_embeddings.weight")[0],
        **source.layer("text.norm", f"{WORDS}.LayerNorm"),
        "image.first": source.take("embeddings.cls_token")[0],
        "image.patch.weight": source.take("embeddings.patch_embeddings.projection.weight").flatten(1),
        "image.patch.bias": source.take("embeddings.patch_embeddings.projection.bias"),
        "image.position.weight": source.take("embeddings.position_embeddings")[0],
        "types.weight": source.take("embeddings.token_type_embeddings.weight")[:2],
    }


def _encoder(source: Source) -> dict[str, Tensor]:
    state = {**source.layer("encoder.final_norm", "layernorm"), **source.layer("pooler.linear", "pooler.dense")}
    for number in range(source.layers(LAYER)):
        for ours, theirs in BLOCK.items():
            state |= source.layer(f"encoder.blocks.{number}.{ours}", *(f"{LAYER}{number}.{part}" for part in theirs))
    return state


def _word_head(source: Source) -> dict[str, Tensor]:
    """Where there is one. Raises UserError for a head with word vectors of its own."""
    head = "mlm_score"
    if not source.has(f"{head}.transform.dense.weight"):
        return {}
    table = f"{head}.decoder.weight"
    if source.has(table) and not torch.equal(source.take(table), source.take(f"{WORDS}.word_embeddings.weight")):
        raise UserError(f"{source.path}: its word head has word vectors of its own, ours shares the encoder's; choose "
                        "a ViLT with tied word vectors")
    bias = f"{head}.bias" if source.has(f"{head}.bias") else f"{head}.decoder.bias"
    return {
        **source.layer("word_head.transform", f"{head}.transform.dense"),
        **source.layer("word_head.norm", f"{head}.transform.LayerNorm"),
        "word_head.bias": source.take(bias),
    }


def _match_head(source: Source) -> dict[str, Tensor]:
    """Two logits whose difference is the one number of theirs."""
    if not source.has("rank_output.weight"):
        return {}
    return {f"match_head.{kind}": torch.cat([torch.zeros_like(score), score])
            for kind, score in ((kind, source.take(f"rank_output.{kind}")) for kind in ("weight", "bias"))}
