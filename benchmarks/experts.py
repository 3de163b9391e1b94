"""Packed experts against the authors' way: one training step of VLMo's transformer on the same sequences and weights.

    python benchmarks/experts.py [--quick]

Authors (arXiv 2111.02358, and its code): sequences of the same modalities form a tensor; in it each modality is filled
up to its longest of the batch, cut off at a fixed place and run by its own expert; attention masks what is filled up.
Packed (opt/nn/multiway.py): all sequences end to end, each expert once over all of its tokens, attention by buckets of
like length. A mixed batch: captions of 8 to 40 words, pictures of 64 patches, recordings of 30 to 200 frames; alone, in
pairs, all three together. Forward and backward on one thread, in seconds of the CPU.
Prints one JSON line: `ratio` = authors' seconds / packed seconds with relative positions, which all sequences of an
authors' tensor share, and `ratio_absolute` without, after both ways were found to say the same.

Shape legend: N packed tokens, b sequences of a group, L their padded length, H heads, D width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opt.data.batch import View
from opt.nn.init import by_width
from opt.nn.multiway import Experts, MultiwayBlock, MultiwayStack
from opt.nn.relative import RelativePositions
from opt.nn.states import States, side_by_side
from opt.systems.shared.multiway import TABLE
from opt.systems.vlmo import trimodal

BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
CONFIG = trimodal().model
ORDER = ("text", "image", "audio")
GROUPS = {("text",): 8, ("image",): 8, ("audio",): 4, ("text", "image"): 16, ("text", "audio"): 8,
          ("text", "image", "audio"): 8}
"""How many sequences of a batch are made of which modalities."""
LONGEST = {"text": (10, 43), "image": (65, 66), "audio": (31, 202)}
"""Tokens of a part, special ones counted: from, and below."""


@dataclass(frozen=True)
class Group:
    """Sequences of the same modalities as the authors have them. hidden (b, L, D); valid (b, L) bool; spans: where each
    modality lies; whole: one sequence that fills them all."""

    hidden: Tensor
    valid: Tensor
    spans: dict[str, slice]
    whole: View


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    repetitions = 5 if parser.parse_args().quick else 20
    torch.manual_seed(0)
    sizes = CONFIG.encoder
    stack = MultiwayStack(sizes.width, sizes.heads, sizes.inner, CONFIG.switches, {}, CONFIG.layer_scale,
                          epsilon=CONFIG.norm_epsilon)
    positions = RelativePositions(8, CONFIG.text_positions, CONFIG.frame_positions, sizes.heads, sizes.layers)
    stack.apply(by_width)
    for table in positions.table.values():
        nn.init.normal_(table)
    parts = _parts(np.random.default_rng(0), sizes.width)
    hidden_ND, view = _packed(parts)
    groups = _groups(parts)

    seconds: dict[str, list[float]] = {}
    for name, each in (("", positions), ("_absolute", None)):
        ways: dict[str, Callable[[], Tensor]] = {
            f"packed{name}": partial(_packed_states, stack, each, hidden_ND, view),
            f"authors{name}": partial(_authors_states, stack, each, groups),
        }
        with torch.no_grad():
            torch.testing.assert_close(*(way() for way in ways.values()), rtol=1e-4, atol=1e-4)
        for _ in range(repetitions + 2):  # the first two warm up
            for way, run in ways.items():
                seconds.setdefault(way, []).append(_step(run, stack, positions))
    medians = {way: statistics.median(values[2:]) for way, values in seconds.items()}
    padded = sum(group.valid.numel() for group in groups)
    print(json.dumps({
        **{f"ratio{name}": round(medians[f"authors{name}"] / medians[f"packed{name}"], 3)
           for name in ("", "_absolute")},
        **{f"{way}_seconds": round(value, 4) for way, value in medians.items()},
        "tokens": len(hidden_ND), "authors_padding_share": round(1 - len(hidden_ND) / padded, 3),
        "attention_padding_share": round(1 - len(hidden_ND) / view.layout.padded, 3), "bfloat16": BFLOAT16,
    }))


def _step(way: Callable[[], Tensor], stack: nn.Module, positions: nn.Module) -> float:
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        states_ND = way()
    states_ND.float().square().mean().backward()
    spent = time.process_time() - began
    for module in (stack, positions):
        module.zero_grad(set_to_none=True)
    return spent


def _parts(rng: np.random.Generator, width: int) -> dict[tuple[str, ...], dict[str, list[Tensor]]]:
    """Entries of each part of each sequence, by group and modality."""
    return {names: {name: [torch.randn(int(rng.integers(*LONGEST[name])), width) for _ in range(count)]
                    for name in names} for names, count in GROUPS.items()}


def _packed(parts: dict[tuple[str, ...], dict[str, list[Tensor]]]) -> tuple[Tensor, View]:
    """All sequences, group by group, end to end."""
    pieces = {name: [entry for names, group in parts.items()
                     for entry in group.get(name, [torch.empty(0, CONFIG.encoder.width)] * GROUPS[names])]
              for name in ORDER}
    states = [States(torch.cat(each), np.array([len(one) for one in each])) for each in pieces.values()]
    return side_by_side(states, [TABLE[name] for name in ORDER])


def _groups(parts: dict[tuple[str, ...], dict[str, list[Tensor]]]) -> list[Group]:
    """The same sequences, each modality filled up to its longest of the batch."""
    longest = {name: torch.zeros(max(len(one) for group in parts.values() for one in group.get(name, [])),
                                 CONFIG.encoder.width) for name in ORDER}
    groups = []
    for names, group in parts.items():
        padded, valid, spans, end = [], [], {}, 0
        for name in names:
            padded.append(pad_sequence([*group[name], longest[name]], batch_first=True)[:-1])
            lengths = torch.tensor([len(one) for one in group[name]])
            valid.append(torch.arange(len(longest[name])) < lengths[:, None])
            spans[name] = slice(end, end := end + len(longest[name]))
        _, whole = side_by_side([States(longest[name], np.array([len(longest[name])])) for name in names],
                                [TABLE[name] for name in names])
        groups.append(Group(torch.cat(padded, 1), torch.cat(valid, 1), spans, whole))
    return groups


def _packed_states(stack: MultiwayStack, positions: RelativePositions | None, hidden_ND: Tensor, view: View) -> Tensor:
    return cast(Tensor, stack(hidden_ND, view, None if positions is None else positions(view)))


def _authors_states(stack: MultiwayStack, positions: RelativePositions | None, groups: list[Group]) -> Tensor:
    return torch.cat([_authors(stack, positions, group)[group.valid] for group in groups])


def _authors(stack: MultiwayStack, positions: RelativePositions | None, group: Group) -> Tensor:
    """(b, L, D): states of a group, its modalities cut apart for their experts in lower layers."""
    hidden_bLD, fused = group.hidden, "fused " if len(group.spans) > 1 else ""
    bias = None if positions is None else positions(group.whole)
    for number, each in enumerate(stack.blocks):
        block, added = cast(MultiwayBlock, each), None if bias is None else bias(number)[0]
        attended_bLD = _attend(block, _of(block.self_norm, "text")(hidden_bLD), added, group.valid)
        hidden_bLD = block.attended(hidden_bLD, attended_bLD)
        experts = {name: block.feed_forward.serves[fused + name] for name in group.spans}
        if len(set(experts.values())) == 1:
            change_bLD = _feed(block, fused + next(iter(experts)), hidden_bLD)
        else:
            change_bLD = torch.cat([_feed(block, fused + name, hidden_bLD[:, span])
                                    for name, span in group.spans.items()], 1)
        hidden_bLD = hidden_bLD + cast(Tensor, block.feed_scale) * change_bLD
    return cast(Tensor, _of(stack.final_norm, "text")(hidden_bLD))


def _feed(block: MultiwayBlock, kind: str, hidden_bLD: Tensor) -> Tensor:
    return cast(Tensor, _of(block.feed_forward, kind)(_of(block.feed_norm, kind)(hidden_bLD)))


def _attend(block: MultiwayBlock, normed_bLD: Tensor, bias_1HLL: Tensor | None, valid_bL: Tensor) -> Tensor:
    """Products, a softmax and products, as the authors have it: on CPUs in bfloat16 faster than torch's kernel."""
    attention = block.self_attention
    query, key, value = (
        each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in
        (_of(attention.query, "text")(normed_bLD), *_of(attention.key_value, "text")(normed_bLD).chunk(2, dim=-1)))
    scores_bHLL = (query * query.shape[-1] ** -0.5) @ key.mT
    if bias_1HLL is not None:
        scores_bHLL = scores_bHLL + bias_1HLL.to(query.dtype)
    scores_bHLL = scores_bHLL.masked_fill(~valid_bL[:, None, None], float("-inf"))
    attended_bLD = (scores_bHLL.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
    return cast(Tensor, _of(attention.output, "text")(attended_bLD))


def _of(experts: Experts, kind: str) -> nn.Module:
    """The expert that tokens of a kind go to."""
    return experts.each[experts.serves[kind] if experts.serves else next(iter(experts.each))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
