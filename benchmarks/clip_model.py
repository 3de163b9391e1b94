"""CLIP (arXiv 2103.00020) out of our blocks: two towers on packed tokens, and the contrast between them.

    pixels --patches--> [class; patches] + positions --Stack--> first token --Projection--> (B, E)
    words  ---------------------------- + positions --Stack--> last token  --Projection--> (B, E)

Every parameter has its like in open_clip's CLIP: `take_over` fills ours with those, and both then say the same.
Shape legend: B pairs, N packed words, P patches of a picture, D width, E shared space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import Batch, View
from opt.data.layout import self_layout
from opt.data.pack import PATCH, Packer
from opt.nn.block import Stack
from opt.nn.heads import Projection, Temperature
from opt.objectives.contrastive import in_batch
from opt.objectives.term import loss


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower; the width of its feed-forward is four times its own."""

    width: int
    layers: int
    heads: int


def pack(pixels: Tensor, captions: list[np.ndarray], patch: int) -> Batch:
    """Pictures (B, 3, S, S) and the words of their captions, end to end.

    views: "text", and "image", the patches of each picture behind its [CLS]; extra: the pixels, the last word of each
    caption, and which pair each is.
    """
    packer = Packer(1, 1)
    places = [packer.sequence("text", [packer.text(words)]) for words in captions]
    extra = {"pixels": pixels, "pair": torch.arange(len(captions)),
             "last": torch.tensor([place.start + place.length - 1 for place in places])}
    batch = packer.batch([str(place.number) for place in places], {}, extra, {"pairs": len(captions)})
    patches = (pixels.shape[-1] // patch) ** 2 + 1
    every, lengths = torch.arange(len(pixels) * patches), np.full(len(pixels), patches)
    image = View(every, every[::patches], self_layout(lengths), lengths, np.full(len(every), PATCH, np.int8))
    return replace(batch, views={**batch.views, "image": image})


class CLIP(nn.Module):
    """image, patch: side lengths in pixels. context: longest caption. space: width of the shared space."""

    def __init__(self, vision: Tower, text: Tower, image: int, patch: int, vocabulary: int, context: int, space: int
                 ) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(3 * patch**2, vision.width, bias=False)
        self.first = nn.Parameter(torch.randn(vision.width) * vision.width**-0.5)
        self.place = nn.Parameter(torch.randn((image // patch) ** 2 + 1, vision.width) * vision.width**-0.5)
        self.norm = nn.LayerNorm(vision.width)
        self.see = Stack(vision.layers, vision.width, vision.heads, 4 * vision.width, 0.0)
        self.seen = Projection(vision.width, space)
        self.word, self.position = nn.Embedding(vocabulary, text.width), nn.Embedding(context, text.width)
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)
        self.read = Stack(text.layers, text.width, text.heads, 4 * text.width, 0.0, causal=True)
        self.said = Projection(text.width, space)
        self.temperature = Temperature()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and captions, (B, E) each."""
        patches_BPD = self.patches(unfold(batch.extra["pixels"], self.patch))
        first_B1D = self.first.to(patches_BPD.dtype).expand(len(patches_BPD), 1, -1)
        hidden_BPD = self.norm(torch.cat([first_B1D, patches_BPD], dim=1) + self.place.to(patches_BPD.dtype))
        image, text = batch.views["image"], batch.views["text"]
        seen_ND = self.see(hidden_BPD.flatten(0, 1), image.layout)
        read_ND = self.read(self.word(batch.text.ids) + self.position(batch.text.positions), text.layout)
        return self.seen(seen_ND[image.first]), self.said(read_ND[batch.extra["last"]])

    def loss(self, batch: Batch) -> Tensor:
        """Symmetric contrast within the batch."""
        seen_BE, said_BE = self(batch)
        term = in_batch(seen_BE, said_BE, batch.extra["pair"], self.temperature(), batch.counts["pairs"],
                        len(batch.keys))
        return loss({"contrast": term})


def unfold(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, S, S) -> (B, P, 3 patch patch), rows of patches from the top."""
    side = pixels.shape[-1] // patch
    grid = pixels.unflatten(3, (side, patch)).unflatten(2, (side, patch))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def take_over(ours: CLIP, theirs: nn.Module) -> None:
    """Fill ours with the weights of an `open_clip.CLIP` of the same sizes."""
    state = dict(theirs.state_dict())
    found = {
        "patches.weight": state["visual.conv1.weight"].flatten(1), "first": state["visual.class_embedding"],
        "place": state["visual.positional_embedding"], "seen.linear.weight": state["visual.proj"].T,
        "word.weight": state["token_embedding.weight"], "position.weight": state["positional_embedding"],
        "said.linear.weight": state["text_projection"].T, "temperature.log_scale": state["logit_scale"].view(1),
    }
    for ours_at, theirs_at in (("norm", "visual.ln_pre"), ("see.final_norm", "visual.ln_post"),
                               ("read.final_norm", "ln_final")):
        found.update(_renamed(state, ours_at, theirs_at))
    for stack, blocks in (("see", "visual.transformer.resblocks"), ("read", "transformer.resblocks")):
        for number in range(len(getattr(ours, stack).blocks)):
            found.update(_block(state, f"{stack}.blocks.{number}", f"{blocks}.{number}"))
    ours.load_state_dict(found)


def _block(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    found = {}
    for kind in ("weight", "bias"):
        query, key, value = state[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
        found[f"{ours}.self_attention.query.{kind}"] = query
        found[f"{ours}.self_attention.key_value.{kind}"] = torch.cat([key, value])
    for mine, other in (("self_norm", "ln_1"), ("self_attention.output", "attn.out_proj"), ("feed_norm", "ln_2"),
                        ("feed_forward.0", "mlp.c_fc"), ("feed_forward.2", "mlp.c_proj")):
        found.update(_renamed(state, f"{ours}.{mine}", f"{theirs}.{other}"))
    return found


def _renamed(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
