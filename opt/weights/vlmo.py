"""Published VLMos to ours: the authors' .pt files, pretrained or fine-tuned (arXiv 2111.02358).

    transformer.blocks.N.{norm1, attn}, gamma_1, gamma_2        what all modalities share
    transformer.blocks.N.{norm2, mlp}_{text, imag, vl}          experts of text, of image, and of both together: "fused"
    relative_position_bias_table                                pieces of the table: image, across, text
    text_embeddings, transformer.{patch_embed, cls_token}       words and patches; types are added into their last sums
    itc_*, itc_vl_*, pooler, itm_score                          both contrasts, matching

A file holds no settings: sizes are those of the tensors. The word head is new unless its word vectors are the
encoder's, as ours are: the authors' has its own. Fine-tuned files have no contrast or no matching, which is new then.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.tokenizer import Tokenizer
from opt.nn.multiway import SHARED
from opt.systems.shared.config import Sizes
from opt.systems.vlmo import VLMoConfig
from opt.weights.beit import layer
from opt.weights.importing import Imported
from opt.weights.source import Source

EXPERTS = {"text": "text", "image": "imag", "fused": "vl"}
"""Ours and theirs."""
SPACES = {"own": ("itc", "logit_scale"), "fused": ("itc_vl", "logit_vl_scale")}
"""What the parts of both contrasts are called."""
BLOCKS, TABLE, WORDS = "transformer.blocks.", "relative_position_bias_table", "text_embeddings"
PLACED = f"{WORDS}.position_embeddings.weight"
"""Where words stand; in files with a table of relative positions it is there, and not used."""
PLACES = 196
"""Of words in the authors' tables, of whatever stage: their language stage reads so many."""
HEADS = 16
"""Of their one model without a table of relative positions (base plus), which would tell."""


def vocabulary(path: Path) -> Tokenizer:
    """BERT's words: a folder, or its vocab.txt."""
    return Tokenizer.from_bert(path) if path.is_dir() else Tokenizer.from_vocab(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors. Raises UserError for networks that are not VLMo's."""
    config = _config(source)
    state = {**_text(source, config), **_image(source), **_stack(source), **_contrasts(source), **_heads(source)}
    if source.has(TABLE):
        state |= _positions(source, config)
    parts = ("spaces.", "match_head.", "word_head.")
    fresh = [part for part in parts if not any(name.startswith(part) for name in state)]
    if not any(".fused." in name and name.startswith("stack.") for name in state):  # as their language stage leaves it
        fresh += [f"stack.blocks.{number}.{part}.each.fused." for number in range(config.encoder.layers)
                  for part in ("feed_norm", "feed_forward")]
    longer = tuple(name for name in ("embedders.text.token.weight", "word_head.bias") if name in state)
    return Imported(config, tokenizer, state, tuple(fresh), longer)


def _config(source: Source) -> VLMoConfig:
    """Sizes of the tensors; how it is trained is the paper's."""
    published, layers = VLMoConfig(), source.layers(BLOCKS)
    if not layers:
        raise UserError(f"{source.path} holds no {BLOCKS}0.norm1.weight, which a VLMo has; give one as its authors "
                        "publish it")
    inner, width = source.shape(f"{BLOCKS}0.mlp_imag.fc1.weight")
    fused = sum(source.has(f"{BLOCKS}{number}.mlp_vl.fc1.weight") for number in range(layers))
    side = source.shape("transformer.patch_embed.proj.weight")[-1]
    heads = source.shape(TABLE)[1] // layers if source.has(TABLE) else HEADS
    grid = _grid(source) if source.has(TABLE) else math.isqrt(source.shape("transformer.pos_embed")[1] - 1)
    return dataclasses.replace(
        published, sight=dataclasses.replace(published.sight, size=grid * side, patch=side),
        encoder=Sizes(width, layers, heads, inner), fused_layers=fused or min(published.fused_layers, layers),
        positions="relative" if source.has(TABLE) else "absolute",
        contrasts="code" if source.has("itc_vl_text_proj.fc.weight") else "paper", space=width,
        text_positions=min(published.text_positions, source.shape(PLACED)[0] if source.has(PLACED) else PLACES),
    )


def _text(source: Source, config: VLMoConfig) -> dict[str, Tensor]:
    """Words, BERT's type 0 and LayerNorm; VLMo's own type is added behind the norm, where ours has its bias."""
    ours = "embedders.text"
    norm = source.layer(f"{ours}.norm", f"{WORDS}.LayerNorm")
    norm[f"{ours}.norm.bias"] = norm[f"{ours}.norm.bias"] + source.take("token_type_embeddings.weight")[0]
    state = {**norm, f"{ours}.token.weight": source.take(f"{WORDS}.word_embeddings.weight"),
             f"{ours}.modality": source.take(f"{WORDS}.token_type_embeddings.weight")[0]}
    if config.positions == "absolute":
        state[f"{ours}.position.weight"] = source.take(PLACED)[: config.text_positions]
    return state


def _image(source: Source) -> dict[str, Tensor]:
    """Patches and class token with the type of a picture; a second picture's (NLVR2) stays behind."""
    ours, kind = "embedders.image", source.take("token_type_embeddings.weight")[1]
    patch = source.layer(f"{ours}.patch", "transformer.patch_embed.proj")
    state = {f"{ours}.first": source.take("transformer.cls_token").reshape(1, -1) + kind,
             f"{ours}.patch.weight": patch[f"{ours}.patch.weight"].flatten(1),
             f"{ours}.patch.bias": patch[f"{ours}.patch.bias"] + kind}
    if source.has("transformer.pos_embed"):
        state[f"{ours}.position.weight"] = source.take("transformer.pos_embed")[0]
    return state


def _stack(source: Source) -> dict[str, Tensor]:
    """Blocks with the experts that each has, and the last norm."""
    state = source.layer(f"stack.final_norm.each.{SHARED}", "transformer.norm")
    for number in range(source.layers(BLOCKS)):
        ours, theirs = f"stack.blocks.{number}", f"{BLOCKS}{number}"
        state |= layer(source, theirs, ours)
        for expert, name in EXPERTS.items():
            if source.has(f"{theirs}.mlp_{name}.fc1.weight"):
                state |= source.layer(f"{ours}.feed_norm.each.{expert}", f"{theirs}.norm2_{name}")
                state |= source.layer(f"{ours}.feed_forward.each.{expert}.0", f"{theirs}.mlp_{name}.fc1")
                state |= source.layer(f"{ours}.feed_forward.each.{expert}.3", f"{theirs}.mlp_{name}.fc2")
    return state


def _grid(source: Source) -> int:
    """Patches along a side, from the rows of the table. Raises UserError for a table of another kind."""
    square = source.shape(TABLE)[0] - 3 - 2 * PLACES - 2
    side = math.isqrt(max(square, 0))
    if side**2 != square or side % 2 == 0:
        raise UserError(f"{source.path}: {TABLE} has {source.shape(TABLE)[0]:,} rows, not VLMo's: (2 g - 1)^2 + 3 for "
                        f"a grid of g x g patches, 2 across, 2 x {PLACES} for words; give another file")
    return (side + 1) // 2


def _positions(source: Source, config: VLMoConfig) -> dict[str, Tensor]:
    """The table in pieces: of words those that so many as we read can be apart. Theirs count from key to query, ours
    from query to key; the first token's three rows come last in both."""
    table, image = source.take(TABLE), (2 * config.sight.grid - 1) ** 2 + 3
    words, most = table[image + 2 : -3].flip(0), config.text_positions - 2
    middle = len(words) // 2
    pieces = {"image": table[:image], "across": table[image : image + 2],
              "text": torch.cat([words[middle - most : middle + most + 1], table[-3:]])}
    return {f"positions.table.{name}": piece for name, piece in pieces.items()}


def _contrasts(source: Source) -> dict[str, Tensor]:
    """Projections and temperatures, where the file has them."""
    state: dict[str, Tensor] = {}
    for space, (stem, scale) in SPACES.items():
        if source.has(f"{stem}_text_proj.fc.weight"):
            state |= {f"spaces.{space}.project.{name}.linear.weight": source.take(f"{stem}_{name}_proj.fc.weight")
                      for name in ("text", "image")}
            state[f"spaces.{space}.temperature.log_scale"] = source.take(scale).reshape(1)
    return state


def _heads(source: Source) -> dict[str, Tensor]:
    """Pooler; matching, where there is one; the word head, where its word vectors are the encoder's."""
    state = source.layer("pooler.linear", "pooler.dense")
    if source.has("itm_score.fc.weight"):
        state |= source.layer("match_head", "itm_score.fc")
    table = "mlm_score.decoder.weight"
    if source.has(table) and torch.equal(source.tensors[table], source.tensors[f"{WORDS}.word_embeddings.weight"]):
        source.take(table)
        state |= {"word_head.bias": source.take("mlm_score.bias"),
                  **source.layer("word_head.transform", "mlm_score.transform.dense"),
                  **source.layer("word_head.norm", "mlm_score.transform.LayerNorm")}
    return state
