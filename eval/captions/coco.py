"""BLEU-1..4, ROUGE-L and CIDEr-D as coco-caption computes them, on words that are already cut (eval/captions/ptb.py).

    candidates, one a picture ------+--> BLEU counts (N, ...) --summed--> corpus BLEU-1..4
    references, some a picture -----+--> ROUGE-L (N,)
                                    +--> CIDEr-D (N,), document frequencies over the references

Equal to pycocoevalcap to rounding; tests/eval/test_eval_captions.py holds them against each other.
Shape legend: N pictures, K = 4 lengths of n-grams, S bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from eval.metrics import interval, resampled_sums

LONGEST = 4
"""Words of the longest n-gram."""
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

Words = Sequence[str]
Vector = list[dict[tuple[str, ...], float]]


def ngrams(words: Words) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to 4 words stands in `words`."""
    return Counter(
        tuple(words[first : first + length])
        for length in range(1, LONGEST + 1)
        for first in range(len(words) - length + 1)
    )


# ---- BLEU -----------------------------------------------------------------------------------------------------------


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What corpus BLEU is made of, (N, 2 K + 2): summed over any choice of pictures it gives the BLEU of that choice.

    Columns: the candidate's n-grams of each length that a reference has (each as often as the reference that has it
    most), all its n-grams of each length, its words, and the words of the reference closest in length (the shorter of
    two that are equally close).
    """
    rows = []
    for words, others in zip(candidates, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= ngrams(other)
        matched = Counter({length: 0 for length in range(1, LONGEST + 1)})
        for ngram, times in (ngrams(words) & most).items():
            matched[len(ngram)] += times
        written = [max(len(words) - length, 0) for length in range(LONGEST)]
        closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        rows.append([*matched.values(), *written, len(words), closest])
    return np.array(rows, np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU-1..4 in [0, 1], (K,): Papineni et al. 2002, with coco-caption's guards against empty sums."""
    return _bleu_of_sums(counts.sum(0)[None])[0]


def bleu_intervals(counts: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """95 % bootstrap intervals of `bleu` over pictures, one for each of the K lengths."""
    return [interval(draws) for draws in _bleu_of_sums(resampled_sums(counts, seed)).T]


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """(S, 2 K + 2) sums of counts -> BLEU-1..4 (S, K)."""
    matched_SK, written_SK = sums[:, :LONGEST], sums[:, LONGEST : 2 * LONGEST]
    words_S, reference_words_S = sums[:, -2:].T
    precision_SK = (matched_SK + 1e-15) / (written_SK + 1e-9)
    geometric_SK = np.exp(np.cumsum(np.log(precision_SK), axis=1) / np.arange(1, LONGEST + 1))
    ratio_S = (words_S + 1e-15) / (reference_words_S + 1e-9)
    brevity_S = np.exp(np.minimum(0.0, 1 - 1 / ratio_S))
    return geometric_SK * brevity_S[:, None]


# ---- ROUGE-L --------------------------------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L of each picture, (N,) in [0, 1] (Lin 2004): the longest common subsequence as F with beta 1.2.

    Precision and recall are each the best over the references, not those of one and the same.
    """
    scores = np.zeros(len(candidates))
    for row, (words, others) in enumerate(zip(candidates, references, strict=True)):
        words = words or [""]  # as coco-caption cuts an empty text
        common = [(LCSseq.similarity(words, other or [""]), max(len(other), 1)) for other in others]
        precision = max(length for length, _ in common) / len(words)
        recall = max(length / total for length, total in common)
        if precision and recall:
            scores[row] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return scores


# ---- CIDEr-D --------------------------------------------------------------------------------------------------------


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against the references of N pictures, which also give document frequencies."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        counted = [[ngrams(words) for words in others] for others in references]
        pictures_with = Counter(ngram for others in counted for ngram in set().union(*others))
        self._rarest = float(np.log(len(references)))
        self._rarity = {ngram: self._rarest - float(np.log(times)) for ngram, times in pictures_with.items()}
        self._references = [[self._vector(counts) for counts in others] for others in counted]

    def __call__(self, candidates: Sequence[Words]) -> np.ndarray:
        """Score of each picture's candidate, (N,), from 0 to 10; the usual CIDEr-D of a set is their mean."""
        return np.array(
            [
                np.mean([_likeness(self._vector(ngrams(words)), other) for other in others])
                for words, others in zip(candidates, self._references, strict=True)
            ]
        )

    def _vector(self, counts: Counter[tuple[str, ...]]) -> tuple[Vector, list[float], int]:
        """TF-IDF of the n-grams of each length, the norm of each length, and the number of words."""
        vector: Vector = [{} for _ in range(LONGEST)]
        for ngram, times in counts.items():
            vector[len(ngram) - 1][ngram] = times * self._rarity.get(ngram, self._rarest)
        norms = [float(np.sqrt(sum(weight**2 for weight in part.values()))) for part in vector]
        return vector, norms, sum(times for ngram, times in counts.items() if len(ngram) == 1)


def _likeness(candidate: tuple[Vector, list[float], int], reference: tuple[Vector, list[float], int]) -> float:
    """Clipped cosine, mean over the lengths of n-grams, times a Gaussian of the difference in length, times 10."""
    ours, our_norms, our_words = candidate
    theirs, their_norms, their_words = reference
    total = 0.0
    for mine, their, norm in zip(ours, theirs, np.multiply(our_norms, their_norms).tolist(), strict=True):
        product = sum(min(weight, their[ngram]) * their[ngram] for ngram, weight in mine.items() if ngram in their)
        total += product / norm if norm else product
    return 10 / LONGEST * total * float(np.exp(-((our_words - their_words) ** 2) / (2 * CIDER_SIGMA**2)))
