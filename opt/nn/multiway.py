"""Multiway transformer: any sub-layer switched by modality, token by token, over packed sequences (VLMo, arXiv
2111.02358, section 3.1; BEiT-3, arXiv 2208.10442, section 2.1).

    tokens of all sequences --Route: sorted by kind, once a run--> [text | image | audio | fused text | ...]
        blocks: a switched sub-layer cuts that into the pieces of its experts; attention finds the sequences by layout
    --sorted back--> tokens of all sequences

Nothing is padded from one modality to another, and no expert sees a token that is not its own. A kind is a modality of
a sequence that is nothing else ("text"), or of one with several ("fused text").
Shape legend: N packed tokens, S sequences, D width, H heads, b and L pairs and tokens of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from opt.data.batch import View
from opt.data.layout import AttentionLayout
from opt.data.pack import MODALITY
from opt.nn.attention import attend
from opt.nn.relative import Bias

KINDS = ("text", "fused text", "fused image", "image", "audio", "fused audio")
"""In the order in which tokens lie: neighbours often have one expert."""


@dataclass(frozen=True)
class Route:
    """Which kind each token is of. kinds, sizes: pieces of tokens in order, on the host; order (N,): the token of the
    sequences at each place; place (N,): its inverse."""

    kinds: tuple[str, ...]
    sizes: tuple[int, ...]
    order: Tensor
    place: Tensor

    @staticmethod
    def of(view: View) -> Route:
        """Of the sequences of a view; filler behind them counts to where its table says."""
        kind_N = np.zeros(len(view.tables), np.int8)
        fused_N = np.resize(_several(view), len(kind_N)) if len(kind_N) else np.zeros(0, bool)
        fused_N[int(view.lengths.sum()) :] = False
        for table, name in MODALITY.items():
            for fused, kind in ((False, name), (True, f"fused {name}")):
                kind_N[(view.tables == table) & (fused_N == fused)] = KINDS.index(kind)
        order, sizes = np.argsort(kind_N, kind="stable"), np.bincount(kind_N, minlength=len(KINDS))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        device = view.gather.device
        return Route(KINDS, tuple(sizes.tolist()), *(torch.from_numpy(each).to(device) for each in (order, place)))

    def as_fused(self) -> Route:
        """The same tokens, all of them taken for parts of fused sequences."""
        return replace(self, kinds=tuple(f"fused {kind.removeprefix('fused ')}" for kind in self.kinds))


def _several(view: View) -> np.ndarray:
    """Whether each token's sequence has several modalities: bool (N,), filler left out."""
    starts = np.cumsum(view.lengths) - view.lengths
    if not len(starts):
        return np.zeros(0, bool)
    real = view.tables[: int(view.lengths.sum())]
    several_S = np.minimum.reduceat(real, starts) != np.maximum.reduceat(real, starts)
    return np.repeat(several_S, view.lengths)


class Experts(nn.Module):
    """A sub-layer, one copy of it for each expert.

    serves: by kind of token, the expert that it goes to; kinds that are not named share the expert SHARED.
    """

    def __init__(self, make: Callable[[], nn.Module], serves: Mapping[str, str]) -> None:
        super().__init__()
        self.serves = {kind: serves.get(kind, SHARED) for kind in KINDS} if serves else {}
        self.each = nn.ModuleDict({name: make() for name in dict.fromkeys(self.serves.values())} or {SHARED: make()})

    def forward(self, hidden_ND: Tensor, route: Route) -> Tensor:
        """Tokens in the order of the route. In training an expert without tokens runs on none, so that all of its
        parameters have a gradient."""
        if len(self.each) == 1 or not (len(hidden_ND) or torch.is_grad_enabled()):
            return cast(Tensor, next(iter(self.each.values()))(hidden_ND))
        ends = np.cumsum(route.sizes)
        outputs: list[Tensor | None] = [None] * len(route.sizes)
        idle = []
        for name, expert in self.each.items():
            own = [place for place, kind in enumerate(route.kinds) if self.serves[kind] == name and route.sizes[place]]
            if not own:
                idle += [expert(hidden_ND[:0])] if torch.is_grad_enabled() else []
                continue
            sizes = [route.sizes[place] for place in own]
            first, last = int(ends[own[0]]) - sizes[0], int(ends[own[-1]])
            if last - first == sum(sizes):  # neighbours: nothing is copied
                given = hidden_ND[first:last]
            else:
                given = torch.cat([hidden_ND[int(ends[at]) - size : int(ends[at])]
                                   for at, size in zip(own, sizes, strict=True)])
            for place, output in zip(own, expert(given).split(sizes), strict=True):
                outputs[place] = output
        return torch.cat([output for output in outputs if output is not None] + idle)


SHARED = "shared"
"""The one expert of what is not switched, and of kinds that have none of their own."""


@dataclass(frozen=True)
class Switch:
    """What is switched, in one layer: by kind of token the expert of the feed-forward and its norm, and of attention's
    projections and norms. Empty: shared by all."""

    feed: Mapping[str, str]
    attention: Mapping[str, str]


class MultiwayAttention(nn.Module):
    """Self-attention whose projections may be switched; the softmax is over all tokens of a sequence alike.

    inner_norm: LayerNorm of what was attended to, before the last projection (Magneto, arXiv 2210.06423).
    """

    def __init__(self, width: int, heads: int, serves: Mapping[str, str], inner_norm: bool, epsilon: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.query = Experts(lambda: nn.Linear(width, width), serves)
        self.key_value = Experts(lambda: nn.Linear(width, 2 * width), serves)
        self.inner_norm = Experts(lambda: nn.LayerNorm(width, epsilon), serves) if inner_norm else None
        self.output = Experts(lambda: nn.Linear(width, width), serves)

    def forward(self, hidden_ND: Tensor, layout: AttentionLayout, route: Route, bias: Sequence[Tensor] | None
                ) -> Tensor:
        """(N, D). bias: of each bucket of the layout."""
        attended_ND = attend(self.query(hidden_ND, route), self.key_value(hidden_ND, route), self.heads, layout, False,
                             bias)
        return self.project(attended_ND, route)

    def project(self, attended_ND: Tensor, route: Route) -> Tensor:
        """What comes behind the softmax."""
        if self.inner_norm is not None:
            attended_ND = self.inner_norm(attended_ND, route)
        return cast(Tensor, self.output(attended_ND, route))


class MultiwayBlock(nn.Module):
    """x + a attention(norm(x)), then x + b feed-forward(norm(x)), each switched as `switch` says.

    layer_scale: what the learned factors a and b of each channel begin with (arXiv 2103.17239); None: there are none.
    inner_norm: LayerNorm inside both, before their last projection (Magneto).
    """

    def __init__(
        self, width: int, heads: int, inner: int, switch: Switch, layer_scale: float | None, inner_norm: bool,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.self_norm = Experts(lambda: nn.LayerNorm(width, epsilon), switch.attention)
        self.self_attention = MultiwayAttention(width, heads, switch.attention, inner_norm, epsilon)
        self.feed_norm = Experts(lambda: nn.LayerNorm(width, epsilon), switch.feed)
        self.feed_forward = Experts(
            lambda: nn.Sequential(nn.Linear(width, inner), nn.GELU(),
                                  nn.LayerNorm(inner, epsilon) if inner_norm else nn.Identity(),
                                  nn.Linear(inner, width)), switch.feed)
        self.self_scale, self.feed_scale = (
            None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(self, hidden_ND: Tensor, layout: AttentionLayout, route: Route, bias: Sequence[Tensor] | None
                ) -> Tensor:
        """(N, D) -> (N, D), tokens in the order of the route, which the layout knows."""
        attended_ND = self.self_attention(self.self_norm(hidden_ND, route), layout, route, bias)
        return self.feed(self.attended(hidden_ND, attended_ND), route)

    def attended(self, hidden: Tensor, change: Tensor) -> Tensor:
        """The residual sum behind attention."""
        return hidden + (change if self.self_scale is None else self.self_scale * change)

    def feed(self, hidden: Tensor, route: Route) -> Tensor:
        """The second half."""
        change = self.feed_forward(self.feed_norm(hidden, route), route)
        return hidden + (change if self.feed_scale is None else self.feed_scale * change)


class MultiwayStack(nn.Module):
    """Blocks in order, and a last norm. switches: of each layer. norm: experts of the last norm."""

    def __init__(
        self, width: int, heads: int, inner: int, switches: Sequence[Switch], norm: Mapping[str, str],
        layer_scale: float | None = None, inner_norm: bool = False, epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MultiwayBlock(width, heads, inner, switch, layer_scale, inner_norm, epsilon)
                                    for switch in switches)
        self.final_norm = Experts(lambda: nn.LayerNorm(width, epsilon), norm)

    def forward(self, hidden_ND: Tensor, view: View, bias: Bias | None = None) -> Tensor:
        """States of every token of the view's sequences (N, D)."""
        route = Route.of(view)
        run_ND = self.run(hidden_ND[route.order], sorted_layout(view, route), route, bias)
        return self.normed(run_ND, route)

    def run(
        self, hidden_ND: Tensor, layout: AttentionLayout, route: Route, bias: Bias | None = None, first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Blocks `first` to `last` over tokens in the order of the route, before the last norm."""
        for number, block in list(enumerate(self.blocks))[first:last]:
            hidden_ND = block(hidden_ND, layout, route, None if bias is None else bias(number))
        return hidden_ND

    def normed(self, hidden_ND: Tensor, route: Route) -> Tensor:
        """The last norm, and tokens back in the order of their sequences."""
        return cast(Tensor, self.final_norm(hidden_ND, route))[route.place]


def sorted_layout(view: View, route: Route) -> AttentionLayout:
    """Of the view's sequences, whose tokens lie in the order of the route."""
    return view.layout.sorted_by(route.order, route.place)
