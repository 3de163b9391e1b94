"""Published ALBEFs to ours: the authors' .pth files, pretrained or fine-tuned for retrieval.

    visual_encoder.*, text_encoder.*, vision_proj.*, text_proj.*           our encoders, and with _m their twin
    image_queue, text_queue, idx_queue, queue_ptr                          the ring: (E, K) there, (K, E) here
    itm_head.*, temp                                                       matching, temperature

A file holds no settings: sizes are those of the tensors, heads are 64 wide. Fine-tuned ones have no word head, which is
new then; one without momentum parts has a twin that begins as a copy.
Shape legend: K rows of the ring, E shared space.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from opt.config import UserError
from opt.data.tokenizer import Tokenizer
from opt.objectives.contrastive import NO_PICTURE
from opt.systems.albef import ALBEFConfig, base
from opt.systems.shared.config import Sizes
from opt.weights.bert import ENCODER
from opt.weights.importing import Imported
from opt.weights.source import Source
from opt.weights.vit import HEAD, tower

CROSS = {
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_norm": ("crossattention.output.LayerNorm",),
}
"""Modules of our block that looks at a context, and those of their layer, one below the other."""
TEXT, IMAGE, WORDS = "towers.text", "towers.image", "word_head"
EMPTY = -100
"""Stands in idx_queue where nothing has been pushed yet."""


def vocabulary(path: Path) -> Tokenizer:
    """BERT's words: a folder, or its vocab.txt."""
    return Tokenizer.from_bert(path) if path.is_dir() else Tokenizer.from_vocab(path)


def convert(source: Source, tokenizer: Tokenizer) -> Imported:
    """Settings and tensors. Raises UserError for networks that are not ALBEF's."""
    online = _encoders(source, "")
    kept = _encoders(source, "_m") if source.has("vision_proj_m.weight") else online
    state = {f"{stem}.{name}": tensor for stem, tensors in (("encoders", online), ("twin.copy", kept))
             for name, tensor in tensors.items()}
    state |= source.layer("match_head", "itm_head") | _ring(source)
    state["contrast.temperature.log_scale"] = -source.take("temp").reshape(1).log()
    parts = (f"encoders.{WORDS}.", f"twin.copy.{WORDS}.", "contrast.ring.")
    return Imported(
        _config(source, online), tokenizer, state,
        fresh=tuple(part for part in parts if not any(name.startswith(part) for name in state)),
        longer=tuple(name for name in state if name.endswith((f"{TEXT}.embedder.token.weight", f"{WORDS}.bias"))),
    )


def _encoders(source: Source, twin: str) -> dict[str, Tensor]:
    """All that has a twin, of the model ("") or of the twin ("_m")."""
    stem = _stem(source, twin)
    state = tower(source, f"visual_encoder{twin}.", f"{IMAGE}.embedder", f"{IMAGE}.stack")
    embedder, embeddings = f"{TEXT}.embedder", f"{stem}embeddings."
    state |= source.layer(f"{embedder}.norm", f"{embeddings}LayerNorm") | {
        f"{embedder}.token.weight": source.take(f"{embeddings}word_embeddings.weight"),
        f"{embedder}.position.weight": source.take(f"{embeddings}position_embeddings.weight"),
        f"{embedder}.modality": source.take(f"{embeddings}token_type_embeddings.weight")[0],
    }
    alone = _layers_alone(source, stem)
    for number in range(source.layers(f"{stem}encoder.layer.")):
        fuses = number >= alone
        ours = f"fusion.blocks.{number - alone}" if fuses else f"{TEXT}.stack.blocks.{number}"
        for part, modules in {**ENCODER, **(CROSS if fuses else {})}.items():
            state |= source.layer(f"{ours}.{part}", *(f"{stem}encoder.layer.{number}.{name}" for name in modules))
    for ours, theirs in (("image", "vision_proj"), ("text", "text_proj")):
        state |= source.layer(f"project.{ours}.linear", theirs + twin)
    return state | _word_head(source, twin, state[f"{embedder}.token.weight"])


def _stem(source: Source, twin: str) -> str:
    """What stands before BERT's names: fine-tuned models have lost the word head, and "bert." with it."""
    plain = f"text_encoder{twin}."
    return f"{plain}bert." if source.layers(f"{plain}bert.encoder.layer.") else plain


def _layers_alone(source: Source, stem: str) -> int:
    """How many layers read the text alone. Raises UserError where the network is not ALBEF's."""
    layers = range(source.layers(f"{stem}encoder.layer."))
    looks = [source.has(f"{stem}encoder.layer.{number}.crossattention.self.query.weight") for number in layers]
    alone = looks.index(True) if True in looks else 0
    if not alone or not all(looks[alone:]):
        raise UserError(f"{source.path}: ALBEF's text_encoder has layers that read the text alone, and behind them "
                        "layers that look at the picture; give an ALBEF (opt import reads a BLIP as blip)")
    return alone


def _word_head(source: Source, twin: str, words: Tensor) -> dict[str, Tensor]:
    """The word head, where there is one. Raises UserError for a head with word vectors of its own."""
    head = f"text_encoder{twin}.cls.predictions"
    if not source.has(f"{head}.bias"):
        return {}
    bias = source.take(f"{head}.bias")
    for name, tied in ((f"{head}.decoder.weight", words), (f"{head}.decoder.bias", bias)):
        if source.has(name) and not torch.equal(source.take(name), tied):
            raise UserError(f"{source.path}: {name} is not that of the word vectors, which ALBEF's is; choose another "
                            "checkpoint")
    return {f"{WORDS}.bias": bias, **source.layer(f"{WORDS}.transform", f"{head}.transform.dense"),
            **source.layer(f"{WORDS}.norm", f"{head}.transform.LayerNorm")}


def _ring(source: Source) -> dict[str, Tensor]:
    """The queues, where the file has them. Numbers of pictures are those of the authors' files: forgotten."""
    if not source.has("image_queue"):
        return {}
    rows = source.shape("image_queue")[1]
    filled = source.take("idx_queue").reshape(-1) != EMPTY if source.has("idx_queue") else torch.ones(rows) > 0
    state = {"picture": torch.full((rows,), NO_PICTURE), "place": source.take("queue_ptr").reshape(())}
    for name in ("image", "text"):
        state |= {name: source.take(f"{name}_queue").T.contiguous(), f"has_{name}": filled.clone()}
    return {f"contrast.ring.{name}": tensor for name, tensor in state.items()}


def _config(source: Source, encoders: dict[str, Tensor]) -> ALBEFConfig:
    """Sizes of the tensors; how it is trained is the paper's."""
    alone = _layers_alone(source, _stem(source, ""))
    sizes = {}
    for name, layers in ((TEXT, alone), (IMAGE, source.layers("visual_encoder.blocks."))):
        inner, width = encoders[f"{name}.stack.blocks.0.feed_forward.0.weight"].shape
        sizes[name] = Sizes(width, layers, max(width // HEAD, 1), inner)
    published, places = base().model, len(encoders[f"{IMAGE}.embedder.position.weight"])
    side = math.isqrt(encoders[f"{IMAGE}.embedder.patch.weight"].shape[1] // 3)
    return dataclasses.replace(
        published, sight=dataclasses.replace(published.sight, size=math.isqrt(places - 1) * side, patch=side),
        image=sizes[IMAGE], text=sizes[TEXT],
        fusion_layers=source.layers(f"{_stem(source, '')}encoder.layer.") - alone,
        space=len(encoders["project.text.linear.weight"]),
        text_positions=len(encoders[f"{TEXT}.embedder.position.weight"]),
        ring_rows=source.shape("image_queue")[1] if source.has("image_queue") else published.ring_rows,
    )
