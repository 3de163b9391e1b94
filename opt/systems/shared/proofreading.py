"""Proofreading: which word of a caption is wrong, and what should stand there; asked of systems that learn from edits.

    ids, what each piece is thought of --as_words--> Word: text, how likely it is wrong, what is proposed instead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from opt.data.record import Sample
from opt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Word:
    """A word of a caption: how likely it is wrong, from 0 to 1, and what would be right if it is."""

    text: str
    wrong: float
    proposed: str


@dataclass(frozen=True)
class Edit:
    """A caption with one wrong word: `place` counts words from 0, `original` stood there and `edited` does now."""

    caption: str
    place: int
    original: str
    edited: str


@runtime_checkable
class Proofreader(Protocol):
    """A system that can be asked."""

    def wrong_words(self, samples: Sequence[Sample], modalities: Sequence[str]) -> list[list[Word]]:
        """Of each sample the words of its caption, judged by what `modalities` shows: "image", or "audio"."""
        ...

    def edited_captions(self, samples: Sequence[Sample], seed: int) -> list[Edit | None]:
        """Each caption with one word changed by the system's own editor; None where no word can be. What is drawn
        depends on the seed and the sample's key and caption alone."""
        ...


def as_words(tokenizer: Tokenizer, ids: np.ndarray, wrong_L: np.ndarray, proposed_L: np.ndarray) -> list[Word]:
    """The words that `ids` (L,) make. A word is as wrong as the worst of its pieces, in whose place stands what is
    proposed for that piece."""
    words, word_L = [], tokenizer.words_of(ids)
    for pieces in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(word_L)) + 1):
        worst = pieces[np.argmax(wrong_L[pieces])]
        proposed = np.where(pieces == worst, proposed_L[pieces], ids[pieces])
        words.append(Word(tokenizer.decode(ids[pieces]), float(wrong_L[worst]), tokenizer.decode(proposed)))
    return words
