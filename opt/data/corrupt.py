"""Corruption: which words, regions, frames, patches or whole modalities a row hides, and which parts it swaps.

Every function takes the row's own random generator, so a row is corrupted alike whatever the worker or world size.
Masks are bool with True = hidden. Rates and rules: docs/opt.md, gaps A1 to A4.
"""

from __future__ import annotations

import numpy as np


def row_generator(key: int) -> np.random.Generator:
    """The generator of one row, from the rng key that the plan gave it."""
    return np.random.Generator(np.random.Philox(key=int(key)))


def positions(length: int, rate: float, rng: np.random.Generator, span: int = 1) -> np.ndarray:
    """Positions hidden at `rate`, in runs of `span`, at least one position: sorted int64 (m,).

    Runs begin independently at every place (some before the first, and they may overlap), so that each position is
    hidden with probability `rate` whatever the span; runs of one are independent positions (gap A5).
    """
    if length < 1:
        raise ValueError("nothing to hide in an empty sequence")
    begins = rng.random(length + span - 1) < 1 - (1 - rate) ** (1 / span)
    hidden = np.flatnonzero(np.convolve(begins, np.ones(span, int), "valid"))
    return hidden if len(hidden) else rng.integers(length, size=1)


def whole_words(word_L: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Positions of words hidden at `rate`, all pieces of a word together, at least one word: sorted int64 (m,).

    word_L: which word, counted from 0, each token belongs to (`Tokenizer.words_of`).
    """
    hidden = positions(int(word_L.max(initial=-1)) + 1, rate, rng)
    return np.flatnonzero(np.isin(word_L, hidden))


def words(ids: np.ndarray, mask_id: int, ordinary: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What stands in place of hidden words (m,): 80 % [MASK], 10 % a random one of `ordinary`, 10 % the word itself."""
    draw = rng.random(len(ids))
    replaced = np.where(draw < 0.8, mask_id, ids)
    random_words = ordinary[rng.integers(len(ordinary), size=len(ids))]
    return np.where((draw >= 0.8) & (draw < 0.9), random_words, replaced)


def blocks(grid: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Patches hidden in rectangles, `rate` of the grid x grid ones, rounded: sorted int64 (m,), row by row.

    Sides and areas are drawn as in BEiT (arXiv 2106.08254, algorithm 1): the logarithm of high by wide evenly from 0.3
    to 1 / 0.3, the area evenly from a twelfth of the grid (its 16 of 14 x 14) to all that is still missing. Rectangles
    may overlap; of the last one only the first patches are hidden, as many as are missing.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate {rate} is not within 0 and 1")
    hidden_GG, count, least = np.zeros((grid, grid), bool), round(rate * grid**2), max(round(grid**2 / 12), 1)
    while missing := count - int(hidden_GG.sum()):
        area, shape = rng.uniform(least, max(least, missing)), np.exp(rng.uniform(-1, 1) * np.log(0.3))
        high, wide = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if high <= grid and wide <= grid:
            top, left = rng.integers(grid - high + 1), rng.integers(grid - wide + 1)
            block_GG = np.zeros_like(hidden_GG)
            block_GG[top : top + high, left : left + wide] = True
            hidden_GG.flat[np.flatnonzero(block_GG & ~hidden_GG)[:missing]] = True
    return np.flatnonzero(hidden_GG)


def modalities(present: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Whole modalities hidden, each with probability `rate`, never all that are present: bool (3,)."""
    if not present.any():
        raise ValueError("a sample without any modality cannot be corrupted")
    while True:
        hidden = (rng.random(len(present)) < rate) & present
        if not np.array_equal(hidden, present):
            return hidden
