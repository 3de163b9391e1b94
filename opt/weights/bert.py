"""A BERT checkpoint (arXiv 1810.04805), as Hugging Face saves it, to the start of OPT (`opt pretrain --start`).

    FOLDER/config.json                           `describe` -> BERT: sizes, where the weights are
    FOLDER/model.safetensors, pytorch_model.bin  `begin`    -> words, positions, encoder, pooler, word head of an OPT
    FOLDER/vocab.txt or tokenizer.json           Tokenizer.from_bert

The encoder is taken over exactly: on text alone OPT's states equal BertModel's. What BERT has not (regions, frames,
decoders, the other heads) keeps its fresh values; what OPT has not (sentence order, heads of other tasks) stays behind.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.tokenizer import SPECIALS
from opt.systems.opt import OPT, OPTConfig
from opt.weights.source import Source

NAMES = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
}
"""Fields of OPTConfig, and what BERT's config.json calls them."""

ENCODER = {
    "self_attention.query": ("attention.self.query",),
    "self_attention.key_value": ("attention.self.key", "attention.self.value"),
    "self_attention.output": ("attention.output.dense",),
    "self_norm": ("attention.output.LayerNorm",),
    "feed_forward.0": ("intermediate.dense",),
    "feed_forward.2": ("output.dense",),
    "feed_norm": ("output.LayerNorm",),
}
"""Modules of our block, and those of BERT's layer whose weights lie in them, one below the other."""


@dataclass(frozen=True)
class BERT:
    """What a folder holds. `settings`: the fields of OPTConfig that the weights fix, with their values."""

    source: Source
    vocabulary: int
    positions: int
    settings: dict[str, Any]


def describe(folder: Path) -> BERT:
    """Read config.json. Raises UserError for a folder without a BERT, and for a network that is not quite BERT's."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a BERT's folder: config.json, weights and vocab.txt")
    source = Source.open(folder)
    settings = source.settings
    if (kind := settings.get("model_type")) != "bert":
        raise UserError(f"{path}: model_type is {kind!r}; only 'bert' can be read (RoBERTa and others count positions "
                        "and cut words otherwise); choose a BERT, or write that model_type where it is one")
    rules = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
             "add_cross_attention": False}
    for name, wanted in rules.items():
        if (value := settings.get(name, wanted)) != wanted:
            raise UserError(f"{path}: {name} is {value!r}, OPT's encoder computes {wanted!r}; choose another BERT")
    sizes = {**NAMES, "vocabulary": "vocab_size", "positions": "max_position_embeddings"}
    values: dict[str, Any] = {name: settings.get(theirs) for name, theirs in sizes.items()}
    for name, value in values.items():
        kind = float if name == "norm_epsilon" else int
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            number = "number" if kind is float else "whole number"
            raise UserError(f"{path}: {sizes[name]} is {value!r}, expected a {number} above 0; copy the folder anew")
    return BERT(source, int(values.pop("vocabulary")), int(values.pop("positions")), {**values, "post_norm": True})


def fitted(config: OPTConfig, bert: BERT) -> OPTConfig:
    """The configuration with the encoder's sizes and norms as BERT's weights need them (gap A17)."""
    positions = min(config.text_positions, bert.positions)
    return dataclasses.replace(config, **bert.settings, text_positions=positions)


def begin(system: OPT, bert: BERT) -> tuple[str, ...]:
    """Fill a new OPT with BERT's weights; returns the names of its parts that now hold them.

    Rows of tokens that our tokenizer appended keep their fresh values. Token type 0 becomes the text's modality vector
    and type 1, where there is one, the regions' (as UNITER has it).
    Raises UserError, with nothing changed, where settings or words differ, or the file is not what config.json says.
    """
    _check_fit(system, bert)
    weights = bert.source
    weights.rename(_plain_name)
    state = {**_embeddings(weights, system), **_encoder(weights, bert.settings["layers"]), **_heads(weights, system)}
    ours = system.state_dict()
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{weights.path}: what belongs to {name} has shape {tuple(tensor.shape)}, expected "
                            f"{tuple(ours[name].shape)} by config.json; copy the folder anew")
    system.load_state_dict(state, strict=False)
    return tuple(dict.fromkeys(name.partition(".")[0] for name in state))


def _check_fit(system: OPT, bert: BERT) -> None:
    """Settings and words against BERT's. Raises UserError that names every option to change."""
    wanted = fitted(system.config, bert)
    names = [field.name for field in dataclasses.fields(OPTConfig)]
    wrong = [name for name in names if getattr(wanted, name) != getattr(system.config, name)]
    if wrong:
        found = ", ".join(f"{name} {getattr(system.config, name)}" for name in wrong)
        options = " ".join(_option(name, getattr(wanted, name)) for name in wrong)
        raise UserError(f"the weights in {bert.source.folder} do not fit a model with {found}; give {options}")
    tokenizer = system.tokenizer
    appended = [name for name in SPECIALS if getattr(tokenizer, name.strip("[]").lower()) >= bert.vocabulary]
    if tokenizer.size != bert.vocabulary + len(appended):
        raise UserError(f"{bert.source.folder} has vectors for {bert.vocabulary:,} tokens, its vocabulary has "
                        f"{tokenizer.size:,} with [BOS] and [EOS] added; give the one the weights were trained with")


def _option(name: str, value: Any) -> str:
    option = f"--model.{name.replace('_', '-')}"
    return option if value is True else f"{option} {value}"


def _plain_name(name: str) -> str:
    """BertModel's name for a tensor, which may have `bert.` before it, and LayerNorm's old names in it."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _embeddings(weights: Source, system: OPT) -> dict[str, Tensor]:
    words, fresh = weights.take("embeddings.word_embeddings.weight"), system.text.token.weight.detach().cpu()
    types = weights.take("embeddings.token_type_embeddings.weight")
    return {
        "text.token.weight": torch.cat([words, fresh[len(words):]]),
        "text.position.weight": weights.take("embeddings.position_embeddings.weight")[: system.config.text_positions],
        "text.modality": types[0],
        **({"regions.modality": types[1]} if len(types) > 1 else {}),
        **weights.layer("text.norm", "embeddings.LayerNorm"),
    }


def _encoder(weights: Source, layers: int) -> dict[str, Tensor]:
    return {
        name: tensor for number in range(layers) for ours, theirs in ENCODER.items()
        for name, tensor in weights.layer(f"encoder.blocks.{number}.{ours}",
                                          *(f"encoder.layer.{number}.{part}" for part in theirs)).items()
    }


def _heads(weights: Source, system: OPT) -> dict[str, Tensor]:
    """Pooler and word head, where the checkpoint has them. Raises UserError for a head with word vectors of its own."""
    state = weights.layer("pooler.linear", "pooler.dense") if weights.has("pooler.dense.weight") else {}
    head = "cls.predictions"
    if not weights.has(f"{head}.bias"):
        return state
    table = f"{head}.decoder.weight"
    if weights.has(table) and not torch.equal(weights.take(table), weights.take("embeddings.word_embeddings.weight")):
        raise UserError(f"{weights.path}: its word head has word vectors of its own, OPT's shares the encoder's; "
                        "choose a BERT with tied word vectors")
    bias, fresh = weights.take(f"{head}.bias"), system.word_head.bias.detach().cpu()
    return {
        **state,
        **weights.layer("word_head.transform", f"{head}.transform.dense"),
        **weights.layer("word_head.norm", f"{head}.transform.LayerNorm"),
        "word_head.bias": torch.cat([bias, fresh[len(bias):]]),
    }
