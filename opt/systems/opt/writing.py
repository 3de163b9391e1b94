"""Writing: an encoded context to text ids or image codes, by the search that a `Sampling` asks for.

    states (B, M, D) --Decoder.start--> caches --opt.nn.search: greedy | draw | beam--> ids (B, L)

Shape legend: B samples, M context tokens, D width, L length, V tokens of the decoder, R rows of the decoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opt.nn import search
from opt.nn.decoder import Decoder
from opt.systems.system import Sampling


def write(
    decoder: Decoder, table_VD: Tensor, context_BMD: Tensor, valid_BM: Tensor, start: int, end: int | None,
    length: int, sampling: Sampling, keys: Sequence[str],
) -> Tensor:
    """Ids (B, length) that follow `start`; after `end` only `end`. `keys` name the samples: each draws its own numbers.

    `sampling` says how many tokens it draws among (`Sampling.for_text`, `Sampling.for_codes`).
    """
    caches = decoder.start(context_BMD, valid_BM, length, sampling.beams)

    def step(ids_R: Tensor, position: int, parents_R: Tensor | None) -> Tensor:
        return decoder.step(ids_R, position, caches, table_VD, parents_R)

    start_B = torch.full((len(keys),), start, device=context_BMD.device)
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
