"""Search: how a step-by-step decoder's logits become sequences.

`step(ids_B, position) -> logits (B, V)` is all a search needs to know of a decoder; caches live behind it.
Shape legend: B sequences, V tokens, L length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]


def sample(
    step: Step, start_B: Tensor, length: int, top_k: int = 1, temperature: float = 1.0,
    end: int | None = None, uniform_BL: Tensor | None = None,
) -> Tensor:
    """Token ids (B, length): the likeliest each time (top_k = 1, greedy) or drawn among the `top_k` likeliest.

    uniform_BL: numbers in [0, 1) that decide the draws, one a sequence and place: what a sequence draws does not depend
    on the others. After `end` a sequence holds only `end`; the loop stops early when all have ended.
    """
    if top_k < 1 or temperature <= 0:
        raise ValueError(f"top_k must be at least 1 and temperature positive, got {top_k} and {temperature}")
    if top_k > 1 and uniform_BL is None:
        raise ValueError("drawing needs random numbers: give uniform_BL, or top_k = 1")
    ids_B, written = start_B, []
    ended_B = torch.zeros_like(start_B, dtype=torch.bool)
    for position in range(length):
        logits_BV = step(ids_B, position).float()
        if uniform_BL is None or top_k == 1:
            ids_B = logits_BV.argmax(dim=-1)
        else:
            ids_B = _draw(logits_BV, top_k, temperature, uniform_BL[:, position])
        if end is not None:
            ids_B = torch.where(ended_B, end, ids_B)
            ended_B = ended_B | (ids_B == end)
        written.append(ids_B)
        if end is not None and bool(ended_B.all()):
            break
    ids_BL = torch.stack(written, dim=1)
    if ids_BL.shape[1] < length:
        ids_BL = torch.nn.functional.pad(ids_BL, (0, length - ids_BL.shape[1]), value=end or 0)
    return ids_BL


def _draw(logits_BV: Tensor, top_k: int, temperature: float, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability of the likeliest `top_k` passes uniform_B."""
    best_BK, ids_BK = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    passed_BK = (best_BK / temperature).softmax(dim=-1).cumsum(dim=-1) <= uniform_B[:, None]
    place_B1 = passed_BK.sum(dim=-1, keepdim=True).clamp(max=best_BK.shape[-1] - 1)
    return ids_BK.gather(1, place_B1).squeeze(1)
