"""Writing: an encoded context to text ids or image codes, by the search that a `Sampling` asks for.

    states (B, M, D) --Writer.start--> caches --opt.nn.search: greedy | draw | beam--> ids (B, L)

Shape legend: B samples, M context tokens, D width, L length, V tokens of the decoder, R rows of the decoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opt.nn import search
from opt.nn.block import BlockCache
from opt.nn.sampling import Sampling


class Writer(Protocol):
    """What writes a token at a time over cached keys and values."""

    @property
    def vocabulary(self) -> int:
        """Tokens that it chooses from."""
        ...

    def start(self, context_BMD: Tensor, valid_BM: Tensor, length: int, beams: int = 1) -> list[BlockCache]:
        """Caches for at most `length` steps over a padded context, `beams` rows a sample beside each other."""
        ...

    def step(self, ids_R: Tensor, position: int, caches: list[BlockCache], parents_R: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the token after `ids_R`, which stands at `position`; the caches take it in. parents_R: the
        row of the step before that each row now continues; None: each its own."""
        ...


def write(
    writer: Writer, context_BMD: Tensor, valid_BM: Tensor, start: Sequence[int], end: int | None, length: int,
    sampling: Sampling, keys: Sequence[str],
) -> Tensor:
    """Ids (B, length) that follow `start`, one token or a prompt; after `end` only `end`. `keys` name the samples: each
    draws its own numbers.

    `sampling` says how many tokens it draws among (`Sampling.for_text`, `Sampling.for_codes`).
    """
    caches = writer.start(context_BMD, valid_BM, length + len(start) - 1, sampling.beams)
    begun = len(start) - 1
    for position, token in enumerate(start[:-1]):
        writer.step(torch.full((len(keys) * sampling.beams,), token, device=context_BMD.device), position, caches)

    def step(ids_R: Tensor, position: int, parents_R: Tensor | None) -> Tensor:
        return writer.step(ids_R, begun + position, caches, parents_R)

    start_B = torch.full((len(keys),), start[-1], device=context_BMD.device)
    if sampling.beams > 1:
        found = search.beam(step, start_B, length, sampling.beams, sampling.length_penalty, end)
        return found.ids[:, 0]
    if sampling.top_k == 1:
        return search.greedy(step, start_B, length, end)
    uniform_BL = torch.from_numpy(np.stack([_uniform(sampling.seed, key, length) for key in keys])).to(start_B.device)
    return search.draw(step, start_B, length, uniform_BL, sampling.top_k or 0, sampling.top_p, sampling.temperature,
                       end)


def _uniform(seed: int, key: str, length: int) -> np.ndarray:
    """The random numbers of one sample (L,): its own, whoever shares its batch."""
    return np.random.default_rng((seed, zlib.crc32(key.encode()))).random(length)
