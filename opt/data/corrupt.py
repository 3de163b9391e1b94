"""Corruption: which words, regions, frames or whole modalities a row hides, and which parts it swaps.

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


def modalities(present: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Whole modalities hidden, each with probability `rate`, never all that are present: bool (3,)."""
    if not present.any():
        raise ValueError("a sample without any modality cannot be corrupted")
    while True:
        hidden = (rng.random(len(present)) < rate) & present
        if not np.array_equal(hidden, present):
            return hidden
