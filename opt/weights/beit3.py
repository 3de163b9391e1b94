"""Published BEiT-3s to ours: the authors' .pth files, in torchscale's names (arXiv 2208.10442).

    beit3.text_embed, beit3.vision_embed.*           words; patches, class token, mask
    beit3.encoder.embed_positions.{A, B}             places of patches and of words, which both begin at row 2
    beit3.encoder.layers.N.MODULE.{A, B}.*           the modules of a block: A is the picture's, B the text's own
    language_head, vision_head, logit_scale          the contrast, of files tuned for retrieval
    mlm_head                                         words, of files tuned for captions

With sharing "code". A file holds no settings: sizes are those of the tensors, heads are 64 wide. Words are those of
beit3.spm (SentencePiece); the authors' table has a few vectors more than it has words, which they never use.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from torch import Tensor

from opt.config import UserError
from opt.data.tokenizer import Tokenizer
from opt.recipe import Stage
from opt.systems.beit3 import BEiT3Config
from opt.systems.shared.config import Sizes
from opt.weights.importing import Imported
from opt.weights.source import Source
from opt.weights.vit import HEAD

EXPERTS = {"image": "A", "text": "B"}
"""Ours and theirs."""
MODULES = {
    "self_attention.query": ("self_attn.q_proj",),
    "self_attention.key_value": ("self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.inner_norm": ("self_attn.inner_attn_ln",),
    "self_attention.output": ("self_attn.out_proj",),
    "self_norm": ("self_attn_layer_norm",),
    "feed_norm": ("final_layer_norm",),
}
"""Modules of our block, and those whose weights lie in them, one below the other; each has both experts."""
FEED = {"0": "fc1", "2": "ffn_layernorm", "3": "fc2"}
"""Parts of a feed-forward."""
LAYERS, PLACES, WORDS = "beit3.encoder.layers.", "beit3.encoder.embed_positions.", "beit3.text_embed.weight"
FIRST_PLACE = 2
"""Rows before it are fairseq's, and not used."""
SPARE = 8
"""Vectors that the authors' table of words has and beit3.spm has not."""


def vocabulary(path: Path) -> Tokenizer:
    """beit3.spm, or the folder that holds it."""
    return Tokenizer.from_sentence_pieces(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors. Raises UserError for networks that are not BEiT-3's, and for other words."""
    state = {**_embedders(source, tokenizer), **_stack(source), **_heads(source, tokenizer)}
    config = _config(source, state)
    state["embedders.text.position.weight"] = state["embedders.text.position.weight"][: config.text_positions]
    parts = ("stack.final_norm.", "heads.", "project.", "temperature.", "pooler.")
    return Imported(config, tokenizer, state,
                    fresh=tuple(part for part in parts if not any(name.startswith(part) for name in state)))


def _config(source: Source, state: dict[str, Tensor]) -> BEiT3Config:
    """Sizes of the tensors; what is hidden is the paper's. It is there to be tuned and asked: hidden patches need image
    codes, of which a file knows nothing."""
    inner, width = source.shape(f"{LAYERS}0.ffn.A.fc1.weight")
    side = source.shape("beit3.vision_embed.proj.weight")[-1]
    grid = math.isqrt(len(state["embedders.image.position.weight"]) - 1)
    published = BEiT3Config()
    return dataclasses.replace(
        published, sight=dataclasses.replace(published.sight, size=grid * side, patch=side),
        encoder=Sizes(width, source.layers(LAYERS), max(width // HEAD, 1), inner), sharing="code",
        fused_layers=0, space=width,
        text_positions=min(published.text_positions, len(state["embedders.text.position.weight"])),
        stage=Stage("contrast", objectives=("contrast",)),
    )


def _embedders(source: Source, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Words as many as there are; patches; places behind fairseq's."""
    patch = source.layer("embedders.image.patch", "beit3.vision_embed.proj")
    return {
        "embedders.text.token.weight": _of_words(source, WORDS, tokenizer),
        "embedders.text.position.weight": source.take(f"{PLACES}B.weight")[FIRST_PLACE:],
        "embedders.image.first": source.take("beit3.vision_embed.cls_token").reshape(1, -1),
        "embedders.image.mask": source.take("beit3.vision_embed.mask_token").reshape(-1),
        "embedders.image.patch.weight": patch["embedders.image.patch.weight"].flatten(1),
        "embedders.image.patch.bias": patch["embedders.image.patch.bias"],
        "embedders.image.position.weight": source.take(f"{PLACES}A.weight")[FIRST_PLACE:],
    }


def _of_words(source: Source, name: str, tokenizer: Tokenizer) -> Tensor:
    """Rows of the words there are. Raises UserError for words that are not the file's."""
    if not 0 <= (spare := source.shape(name)[0] - tokenizer.size) <= SPARE:
        raise UserError(f"{source.path}: {name} has {tokenizer.size + spare:,} rows, the words are {tokenizer.size:,}; "
                        "give those that it was trained with (--tokenizer), beit3.spm for the authors' files")
    return source.take(name)[: tokenizer.size]


def _stack(source: Source) -> dict[str, Tensor]:
    """Blocks, and the last norm where there is one: files tuned to tell classes and answers have none."""
    state: dict[str, Tensor] = {}
    for expert, theirs in EXPERTS.items():
        for number in range(source.layers(LAYERS)):
            ours, layer = f"stack.blocks.{number}", f"{LAYERS}{number}"
            for part, modules in MODULES.items():
                state |= source.layer(f"{ours}.{part}.each.{expert}", *(f"{layer}.{name}.{theirs}" for name in modules))
            for part, name in FEED.items():
                state |= source.layer(f"{ours}.feed_forward.each.{expert}.{part}", f"{layer}.ffn.{theirs}.{name}")
        if source.has(f"beit3.encoder.layer_norm.{theirs}.weight"):
            state |= source.layer(f"stack.final_norm.each.{expert}", f"beit3.encoder.layer_norm.{theirs}")
    return state


def _heads(source: Source, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Contrast and words, where the file has them."""
    state: dict[str, Tensor] = {}
    if source.has("language_head.weight"):
        state = {"project.text.linear.weight": source.take("language_head.weight"),
                 "project.image.linear.weight": source.take("vision_head.weight"),
                 "temperature.log_scale": source.take("logit_scale").reshape(1)}
    if source.has("mlm_head.weight"):
        state |= {f"heads.text.{kind}": _of_words(source, f"mlm_head.{kind}", tokenizer)
                  for kind in ("weight", "bias")}
    return state
