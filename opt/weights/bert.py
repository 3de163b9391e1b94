"""A BERT (arXiv 1810.04805), as transformers saves it, to the start of a text tower (`opt pretrain --start bert:...`).

    FOLDER/config.json                           `describe` -> BERT: sizes, where the weights are
    FOLDER/model.safetensors, pytorch_model.bin  `begin`    -> words, positions, encoder, pooler, word head of a system
    FOLDER/vocab.txt or tokenizer.json           Tokenizer.from_bert

The encoder is taken over exactly: on text alone OPT's states equal BertModel's. What BERT has not (other modalities,
cross-attention, decoders, the other heads) keeps its fresh values; what the system has not stays behind. A system that
edits words by a masked language model of its own (ViLEM) gets a whole BERT for that, too.
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
from opt.nn.block import Block, Stack
from opt.nn.editor import Editor
from opt.nn.embed import RegionEmbedder, TextEmbedder
from opt.nn.heads import Pooler, TokenHead
from opt.systems.opt import OPTConfig
from opt.systems.system import System
from opt.weights.places import Place, fill, places, require_settings
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
HEAD = "cls.predictions"
"""BERT's word head."""


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


def begin(system: System, bert: BERT) -> tuple[str, ...]:
    """Fill the text towers of a new system with BERT's weights; returns the names of its parts that now hold them.

    Layers behind the tower's go to a stack beside it (ALBEF's fusion); what a block has besides stays fresh, but for a
    second self-attention that writes, which begins as the first (BLIP). Rows of tokens that our tokenizer appended keep
    their fresh values. Token type 0 becomes the text's modality vector, or part of the positions where there is none,
    and type 1, where there is one, the regions' (as UNITER has it).
    Raises UserError, with nothing changed, where the system has no such tower, settings or words differ, or the file is
    not what config.json says.
    """
    chosen = hasattr(system.config, "post_norm")  # whether it is BERT's kind is a setting
    towers = [place for place in places(system, TextEmbedder) if chosen or _is_bert(place.stack)]
    if not towers:
        raise UserError(f"--start bert:{bert.source.folder}: system {system.name!r} has no place for a BERT; leave it "
                        "out")
    _check_fit(system, bert, towers[0])
    bert.source.rename(_plain_name)
    ours = {name: tensor.detach().cpu() for name, tensor in system.state_dict().items()}
    state = _heads(bert.source, system, ours)
    for place in towers:
        state |= _embeddings(bert.source, place, ours)
        done = 0
        for name, stack in _stacks(system, place):
            state |= _layers(bert.source, name, done, len(stack.blocks), ours)
            done += len(stack.blocks)
    state |= {f"{name}.taught": torch.tensor(True) for name in _editors(system)}
    return fill(system, state, bert.source.path)


def _stacks(system: System, place: Place) -> list[tuple[str, Stack]]:
    """The tower's stack, and one of the same kind that goes on behind it: a part of a module that holds the tower."""
    behind = [(name, module) for name, module in system.named_modules()
              if isinstance(module, Stack) and module is not place.stack and _is_bert(module)
              and place.name.startswith(name.rpartition(".")[0] + ".")]
    return [(place.stack_name, place.stack), *behind]


def _editors(system: System) -> list[str]:
    """Names of the masked language models that edit words."""
    return [name for name, module in system.named_modules() if isinstance(module, Editor)]


def _is_bert(stack: Stack) -> bool:
    """Whether its blocks normalise after each sum."""
    return all(isinstance(block, Block) and block.post_norm for block in stack.blocks)


def _check_fit(system: System, bert: BERT, place: Place) -> None:
    """Settings and words against BERT's. Raises UserError that names every option to change."""
    behind = sum(len(stack.blocks) for _, stack in _stacks(system, place)[1:])
    settings = {**bert.settings, "layers": bert.settings["layers"] - behind,
                "text_positions": min(system.config.text_positions, bert.positions)}
    place_of = bert.source.folder or bert.source.path
    require_settings(system.config, ("text",), settings, place_of)
    if _editors(system):
        require_settings(system.config, ("editor",), bert.settings, place_of)
        if not bert.source.has(f"{HEAD}.bias"):
            raise UserError(f"{place_of}: it has no word head ({HEAD}), and so cannot edit words; give a BERT as it "
                            "was pretrained (BertForPreTraining or BertForMaskedLM), or --model.edits none")
    tokenizer = system.tokenizer
    if tokenizer.size != bert.vocabulary + int((tokenizer.specials >= bert.vocabulary).sum()):
        raise UserError(f"{bert.source.folder} has vectors for {bert.vocabulary:,} tokens, its vocabulary has "
                        f"{tokenizer.size:,} with [BOS] and [EOS] added; give the one the weights were trained with")


def _plain_name(name: str) -> str:
    """BertModel's name for a tensor, which may have `bert.` before it, and LayerNorm's old names in it."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _embeddings(weights: Source, place: Place, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    words, name = weights.take("embeddings.word_embeddings.weight"), place.embedder_name
    types = weights.take("embeddings.token_type_embeddings.weight")
    positions = weights.take("embeddings.position_embeddings.weight")[: len(ours[f"{name}.position.weight"])]
    state = {f"{name}.token.weight": torch.cat([words, ours[f"{name}.token.weight"][len(words):]])}
    if f"{name}.modality" in ours:
        state |= {f"{name}.position.weight": positions, f"{name}.modality": types[0]}
    else:
        state |= {f"{name}.position.weight": positions + types[0]}
    inside = f"{name}.norm.weight" in ours
    return state | weights.layer(f"{name}.norm" if inside else f"{place.name}norm", "embeddings.LayerNorm")


def _layers(weights: Source, stack: str, first: int, count: int, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers from `first` on into a stack's blocks."""
    state: dict[str, Tensor] = {}
    for number in range(count):
        block = f"{stack}.blocks.{number}"
        for part, theirs in ENCODER.items():
            found = weights.layer(f"{block}.{part}", *(f"encoder.layer.{first + number}.{name}" for name in theirs))
            state |= found
            state |= {writing: tensor for name, tensor in found.items()
                      if (writing := name.replace(".self_", ".writing_")) in ours}
    return state


def _heads(weights: Source, system: System, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the checkpoint has beside the encoder: pooler, word heads, the regions' type. Raises UserError for a word
    head with word vectors of its own."""
    state: dict[str, Tensor] = {}
    types = weights.take("embeddings.token_type_embeddings.weight")
    for name, module in system.named_modules():
        if isinstance(module, RegionEmbedder) and len(types) > 1:
            state[f"{name}.modality"] = types[1]
        if isinstance(module, Pooler) and weights.has("pooler.dense.weight"):
            state |= weights.layer(f"{name}.linear", "pooler.dense")
        if isinstance(module, TokenHead) and weights.has(f"{HEAD}.bias"):
            state |= _word_head(weights, name, ours[f"{name}.bias"])
    return state


def _word_head(weights: Source, name: str, fresh: Tensor) -> dict[str, Tensor]:
    table = f"{HEAD}.decoder.weight"
    if weights.has(table) and not torch.equal(weights.take(table), weights.take("embeddings.word_embeddings.weight")):
        raise UserError(f"{weights.path}: its word head has word vectors of its own, ours shares the encoder's; choose "
                        "a BERT with tied word vectors")
    bias = weights.take(f"{HEAD}.bias")
    return {
        **weights.layer(f"{name}.transform", f"{HEAD}.transform.dense"),
        **weights.layer(f"{name}.norm", f"{HEAD}.transform.LayerNorm"),
        f"{name}.bias": torch.cat([bias, fresh[len(bias):]]),
    }
