"""Published ViLTs to ours: transformers' layout (ViltModel and the models that have one), and the authors' .ckpt.

    embeddings.*, encoder.layer.*      | text_embeddings.*, transformer.*    words, patches, encoder
    pooler.*, mlm_score.*                                                    pooler, head of hidden words
    rank_output.*                      | itm_score.*, rank_output.*          matching

`rank_output` is one number, which retrieval was fine-tuned by: log-odds, so that the logit of "no match" is 0. Sizes
are those of the tensors; what tensors cannot tell (heads, epsilon) is what config.json says, or transformers' default.
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
from opt.weights import vit
from opt.weights.importing import Imported
from opt.weights.source import Source

LONGEST = 1333 / 800
"""The longest side of a picture over the shorter one's size."""


def vocabulary(path: Path) -> Tokenizer:
    """A BERT's words."""
    return Tokenizer.from_vocab(path) if path.is_file() else Tokenizer.from_bert(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors of either layout. Raises UserError for networks that are not ViLT's."""
    for name, wanted in (("model_type", "vilt"), ("hidden_act", "gelu")):
        if (value := source.settings.get(name, wanted)) != wanted:
            raise UserError(f"{source.path}: {name} is {value!r}, expected {wanted!r}; give a ViLT")
    source.rename(lambda name: name.removeprefix("vilt."))
    authors = source.has("text_embeddings.word_embeddings.weight")
    state = {
        **_words(source, "" if authors else "embeddings."),
        **vit.tower(source, "transformer." if authors else "", "image", "encoder"),
        **source.layer("pooler.linear", "pooler.dense"),
        **_word_head(source, "" if authors else "embeddings."),
        **_match_head(source),
    }
    fresh = tuple(f"{head}." for head in ("word_head", "match_head") if f"{head}.bias" not in state)
    longer = tuple(name for name in ("text.token.weight", "word_head.bias") if name in state)
    return Imported(_config(source, state), tokenizer, state, fresh, longer)


def _config(source: Source, state: dict[str, Tensor]) -> ViLTConfig:
    """Sizes of the tensors, with what they cannot tell."""
    width, side = len(state["text.modality"]), math.isqrt(state["image.patch.weight"].shape[1] // 3)
    size = math.isqrt(len(state["image.position.weight"]) - 1) * side
    layers = sum(name.startswith("encoder.blocks.") and name.endswith("self_norm.bias") for name in state)
    mean, deviation = (tuple(source.preprocessing.get(name, (0.5, 0.5, 0.5))) for name in ("image_mean", "image_std"))
    return ViLTConfig(
        Sight(size, side, "keep", int(LONGEST * size), mean=mean, deviation=deviation),
        Sizes(width, layers, source.settings.get("num_attention_heads", max(width // vit.HEAD, 1)),
              len(state["encoder.blocks.0.feed_forward.0.weight"])),
        norm_epsilon=source.settings.get("layer_norm_eps", 1e-12),
        text_positions=len(state["text.position.weight"]),
    )


def _words(source: Source, stem: str) -> dict[str, Tensor]:
    """Words with their token type 0, and the types of both modalities; a second picture's (NLVR2) stays behind."""
    text = f"{stem}text_embeddings"
    return {
        "text.token.weight": source.take(f"{text}.word_embeddings.weight"),
        "text.position.weight": source.take(f"{text}.position_embeddings.weight"),
        "text.modality": source.take(f"{text}.token_type_embeddings.weight")[0],
        **source.layer("text.norm", f"{text}.LayerNorm"),
        "types.weight": source.take(f"{stem}token_type_embeddings.weight")[:2],
    }


def _word_head(source: Source, stem: str) -> dict[str, Tensor]:
    """Where there is one. Raises UserError for a head with word vectors of its own."""
    if not source.has("mlm_score.transform.dense.weight"):
        return {}
    table, words = "mlm_score.decoder.weight", f"{stem}text_embeddings.word_embeddings.weight"
    if source.has(table) and not torch.equal(source.take(table), source.take(words)):
        raise UserError(f"{source.path}: its word head has word vectors of its own, ours shares the encoder's; choose "
                        "a ViLT with tied word vectors")
    return {
        **source.layer("word_head.transform", "mlm_score.transform.dense"),
        **source.layer("word_head.norm", "mlm_score.transform.LayerNorm"),
        "word_head.bias": source.take("mlm_score.bias" if source.has("mlm_score.bias") else "mlm_score.decoder.bias"),
    }


def _match_head(source: Source) -> dict[str, Tensor]:
    """Where there is one; of two that by which retrieval was fine-tuned."""
    if source.has("rank_output.weight"):
        rank = source.layer("match_head", "rank_output")
        return {name: torch.cat([torch.zeros_like(score), score]) for name, score in rank.items()}
    return source.layer("match_head", "itm_score.fc") if source.has("itm_score.fc.weight") else {}
