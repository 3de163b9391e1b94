"""Writing by filling in: [MASK] stands behind what is written, is predicted, and gives way to what it was (BEiT-3,
section 3.1.2; section 8.4 of our notes).

    pictures, speech --all layers, once--> keys and values, followed by room for a text
    step: the last word and a [MASK] behind it --all layers--> state of the [MASK] --> next word

The word's keys and values are kept; those of the [MASK] lie where the next word's will, which replace them.
Shape legend: N packed tokens, B samples, R rows (B, or B beams), M context tokens, L length, H heads, d head width,
D width, V words.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt.data.batch import View
from opt.nn.attention import attend
from opt.nn.block import BlockCache
from opt.nn.embed import TextEmbedder
from opt.nn.multiway import MultiwayBlock, MultiwayStack, Route, sorted_layout
from opt.nn.states import States


class InfillWriter:
    """A `Writer` (opt/nn/writing.py) over a multiway transformer: text sees its context and its own past, the context
    itself alone.

    view: the sequences of the context, in fused sequences.
    """

    def __init__(self, stack: MultiwayStack, words: TextEmbedder, head: nn.Linear, mask: int, view: View) -> None:
        self.stack, self.words, self.head, self.mask, self.view = stack, words, head, mask, view
        self.vocabulary = head.out_features

    def start(self, context_BMD: Tensor, valid_BM: Tensor, length: int, beams: int = 1) -> list[BlockCache]:
        """Keys and values of the context in every layer, `beams` rows a sample, with room for `length` words and a
        [MASK] behind them."""
        route = Route.of(self.view).as_fused()
        layout, hidden_ND, caches = sorted_layout(self.view, route), context_BMD[valid_BM][route.order], []
        valid_RM = valid_BM.repeat_interleave(beams, dim=0)
        for block in self._blocks:
            attention = block.self_attention
            normed_ND = block.self_norm(hidden_ND, route)
            key_value_N2D = attention.key_value(normed_ND, route)
            attended_ND = attend(attention.query(normed_ND, route), key_value_N2D, attention.heads, layout, False)
            hidden_ND = block.feed(block.attended(hidden_ND, attention.project(attended_ND, route)), route)
            padded_BM2D, _ = States(key_value_N2D[route.place], self.view.lengths).padded()
            room_RL2D = F.pad(padded_BM2D.repeat_interleave(beams, dim=0), (0, 0, 0, length + 1))
            key_RLHd, value_RLHd = room_RL2D.unflatten(-1, (2 * attention.heads, -1)).chunk(2, dim=2)
            caches.append(BlockCache(key_RLHd, value_RLHd, None, None, valid_RM))
        return caches

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], parents_R: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the word after `ids_R`, at the [MASK] behind it."""
        at = caches[0].context_valid.shape[1] + position
        if parents_R is not None:
            for cache in caches:
                cache.follow(at, parents_R)
        ids_R2 = torch.stack([ids_R, torch.full_like(ids_R, self.mask)], dim=1)
        hidden_ND = self.words.at(ids_R2, torch.arange(position, position + 2, device=ids_R.device)).flatten(0, 1)
        route = _written(len(hidden_ND), hidden_ND.device)
        for block, cache in zip(self._blocks, caches, strict=True):
            attended_ND = self._attend(block, block.self_norm(hidden_ND, route), route, at, cache)
            hidden_ND = block.feed(block.attended(hidden_ND, attended_ND), route)
        return self.head(self.stack.normed(hidden_ND, route)[1::2])

    @property
    def _blocks(self) -> list[MultiwayBlock]:
        return [cast(MultiwayBlock, block) for block in self.stack.blocks]

    @staticmethod
    def _attend(block: MultiwayBlock, normed_ND: Tensor, route: Route, at: int, cache: BlockCache) -> Tensor:
        """The word looks at context, past and itself, the [MASK] at the word and itself too: (N, D)."""
        attention = block.self_attention
        query_RH2d, key_RH2d, value_RH2d = (
            each.unflatten(0, (-1, 2)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for each in (attention.query(normed_ND, route), *attention.key_value(normed_ND, route).chunk(2, dim=1)))
        for place in range(2):
            key_RLHd, value_RLHd = cache.write(at + place, key_RH2d[:, :, place], value_RH2d[:, :, place])
        rows, length = key_RLHd.shape[:2]
        open_R2L = F.pad(cache.context_valid, (0, length - cache.context_valid.shape[1]), value=True)[:, None]
        open_R2L = open_R2L.expand(rows, 2, length).clone()
        open_R2L[:, 0, -1] = False
        attended_RH2d = F.scaled_dot_product_attention(query_RH2d, key_RLHd.transpose(1, 2), value_RLHd.transpose(1, 2),
                                                       attn_mask=open_R2L[:, None])
        return attention.project(attended_RH2d.transpose(1, 2).reshape(normed_ND.shape), route)


def _written(tokens: int, device: torch.device) -> Route:
    """All of them words of fused sequences."""
    order = torch.arange(tokens, device=device)
    return Route(("fused text",), (tokens,), order, order)
